"""The teacher's flags: which model it is, for every command with a teacher, and its place in training."""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from accelerate.utils import parse_flag_from_env

from gkd.config.generation import VLLM
from gkd.config.values import DTYPES, check_positive, flag, is_address, need

# The value of --teacher_model_name_or_path that means the student without its adapter.
SELF = "self"


@dataclass
class TeacherArguments:
    """Flags that name the teacher and say how it loads."""

    teacher_model_name_or_path: str | None = flag(None, "The teacher.")
    teachers: list[str] | None = flag(
        None,
        "Several teachers, NAME=MODEL, NAME=MODEL:ADAPTER or NAME=ADDRESS of a server. Each row names its own in a column `teacher`. LoRA adapters of "
        "one model share its weights.",
    )
    teacher_revision: str = flag("main", "Branch, tag or commit of the teacher.")
    teacher_adapter: str | None = flag(None, "Folder of a LoRA adapter of the teacher, merged on load.")
    teacher_dtype: str = flag("auto", "The teacher's dtype; auto keeps that of its weights.", choices=list(DTYPES))
    teacher_load_in_4bit: bool = flag(False, "Load the teacher in 4 bit (NF4).")
    teacher_load_in_8bit: bool = flag(False, "Load the teacher in 8 bit.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = flag(
        None, "JSON of further arguments of the teacher's from_pretrained."
    )
    teacher_trust_remote_code: bool = flag(False, "Run model code that comes with the teacher.")
    teacher_device: str | None = flag(
        None,
        "Keep the teacher on this device (cuda:1, cpu), the student's GPU gets a copy of its head. Several with commas "
        "between (cuda:0,cuda:1) each have a part of the layers of a teacher that is too large for one. auto: the GPU behind "
        "those of the students, also with several processes (2 students and 2 teachers on 4 GPUs).",
    )
    teacher_url: str | None = flag(
        None,
        "In place of a teacher here, one behind `gkd serve`: its address http://HOST:PORT, or several with commas "
        "between, which share the work. Its token comes from the environment, GKD_TEACHER_TOKEN.",
    )
    teacher_timeout: float = flag(
        600.0,
        "Seconds in which one of --teacher_url or --teacher_logprobs_url has to answer a request; then the run stops. An "
        "attempt has a share of them: with one server half, with two a third.",
    )
    teacher_logprobs_url: str | None = flag(
        None,
        "In place of a teacher here, one in vLLM or SGLang, which tells its likeliest tokens' log-probabilities: "
        "http://HOST:PORT/v1, or several with commas between, which share the work. That suits --beta 0; exact is "
        "--teacher_url. Its key comes from the environment, GKD_TEACHER_TOKEN.",
    )
    teacher_top_k: int = flag(
        20, "How many of its likeliest tokens it tells there: at most vLLM's --max-logprobs, which is 20 by default."
    )
    teacher_logprobs_requests: int = flag(32, "At most so many requests at once to each of them, of each process.")

    @property
    def teacher_devices(self) -> list[torch.device]:
        """Those of --teacher_device."""
        return list(map(torch.device, self.teacher_device.split(","))) if self.teacher_device else []

    @property
    def teacher_urls(self) -> list[str]:
        """The addresses in --teacher_url or --teacher_logprobs_url, without a slash at the end."""
        return [url.strip().rstrip("/") for url in (self.teacher_url or self.teacher_logprobs_url or "").split(",")]

    def check_teacher(self) -> None:
        """Raises ValueError for flags that exclude each other, an address that is none, or a package that is missing."""
        check_positive(self, ["teacher_timeout", "teacher_top_k", "teacher_logprobs_requests"])
        if self.teacher_device is not None:
            self.teacher_device = _resolved_devices(self.teacher_device)
        self._check_logprobs()
        for name in SERVERS:
            if getattr(self, name) is not None:
                self._check_url(name)
        if self.teachers is not None:
            addresses = [model for model, _ in named_teachers(self.teachers).values() if is_address(model)]
            if addresses:
                _check_addresses("--teachers", addresses)
            for name in ("teacher_model_name_or_path", "teacher_adapter", "teacher_cache", *SERVERS):
                if getattr(self, name, None) is not None:
                    raise ValueError(f"--teachers and --{name} exclude each other.")
        if self.teacher_load_in_4bit and self.teacher_load_in_8bit:
            raise ValueError("Choose one of --teacher_load_in_4bit and --teacher_load_in_8bit.")
        for bits in ("4", "8"):
            if getattr(self, f"teacher_load_in_{bits}bit"):
                need(f"--teacher_load_in_{bits}bit", "bitsandbytes", "quantization")

    def _check_url(self, flag: str) -> None:
        program, like = SERVERS[flag]
        defaults = {item.name: item.default for item in fields(PlacementArguments)} | {"teacher_cache": None}
        beside = {flag, *_BESIDE_URL, *_OF_LOGPROBS}
        for name, default in defaults.items():
            if name.startswith("teacher_") and name not in beside and getattr(self, name, default) != default:
                raise ValueError(
                    f"--{name} does not go with --{flag}: the teacher is the server's, as its own flags ({program}) "
                    "have it. Leave one of the two out."
                )
        _check_addresses(f"--{flag}", self.teacher_urls, like=like)

    def _check_logprobs(self) -> None:
        """Raises ValueError for what log-probabilities of the likeliest tokens can't do."""
        if self.teacher_logprobs_url is None:
            defaults = {item.name: item.default for item in fields(TeacherArguments)}
            for name in _OF_LOGPROBS:
                if getattr(self, name) != defaults[name]:
                    raise ValueError(f"--{name} has no effect without --teacher_logprobs_url.")
        elif getattr(self, "loss_temperature", 1.0) != 1.0:
            raise ValueError(
                f"--loss_temperature {self.loss_temperature}: --teacher_logprobs_url tells log-probabilities at "
                "temperature 1, of which those at another can't be had without the rest of the vocabulary. Leave it at "
                "1, or serve the teacher by gkd serve (--teacher_url)."
            )


def _resolved_devices(names: str) -> str:
    """The names of --teacher_device, with the GPU of this process for `auto`.

    Raises ValueError for a device that there is not, or that others need too.
    """
    defaults = {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "WORLD_SIZE": 1}
    own, here, everywhere = (int(os.environ.get(name, default)) for name, default in defaults.items())
    processes = max(here, everywhere)
    if names == "auto":
        names = f"cuda:{own + here}"
    elif processes > 1 and names != "cpu":
        raise ValueError(
            f"--teacher_device {names}: the teachers of {processes} processes would share it. Use auto, cpu or "
            "--teacher_sharded."
        )
    kinds = {"cpu", "cuda", getattr(torch.accelerator.current_accelerator(), "type", "cpu")}
    chosen, devices = [name.strip() for name in names.split(",")], []
    for name in chosen:
        try:
            devices.append(device := torch.device(name))
            if device.type not in kinds:  # such as meta, which computes nothing
                raise RuntimeError
        except RuntimeError:
            raise ValueError(f"--teacher_device {name}: no such device; cuda:1, cpu and auto are possible.") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--teacher_device {name}: there are {torch.cuda.device_count()} visible GPUs.")
    if len(devices) > 1 and (len(set(devices)) < len(devices) or any(device.index is None for device in devices)):
        raise ValueError(f"--teacher_device {names}: several must be different GPUs, each with its number.")
    return ",".join(chosen)


def _check_addresses(
    flag: str, urls: list[str], variable: str = "GKD_TEACHER_TOKEN", like: str = "http://127.0.0.1:8500"
) -> None:
    """Raises ValueError for one that is none, holds a password or is there twice, or for a package that is missing."""
    for url in urls:
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is no number
            good = False
        if not good or url != "".join(url.split()) or parts.query or parts.fragment:
            raise ValueError(f"{flag} {url}: no address of a server; it is like {like}.")
        if "@" in parts.netloc:  # it would be recorded; nor is it repeated here
            raise ValueError(f"{flag} holds a name or password: give a token by {variable} instead.")
    if len(set(urls)) < len(urls):
        raise ValueError(f"{flag} {','.join(urls)}: an address twice.")
    need(flag, "httpx", "serve")
    need(flag, "tenacity", "serve")


# The flags that name servers of a teacher: what starts one, and what its address is like.
SERVERS = {
    "teacher_url": ("gkd serve", "http://127.0.0.1:8500"),
    "teacher_logprobs_url": ("vllm serve", "http://127.0.0.1:8000/v1"),
}
# Flags about servers, and about text, which go beside them.
_BESIDE_URL = ("teacher_timeout", "teacher_text_cache")
_OF_LOGPROBS = ("teacher_top_k", "teacher_logprobs_requests")


def named_teachers(words: list[str]) -> dict[str, tuple[str, str | None]]:
    """NAME=MODEL or NAME=MODEL:ADAPTER, several times -> model and adapter by name. Raises ValueError for other words.

    MODEL may be an address as in `--teacher_url`.
    """
    named = {}
    for word in words:
        name, equals, place = word.partition("=")
        model, colon, adapter = place.rpartition(":")
        if not (colon and model and (Path(adapter) / "adapter_config.json").is_file()):
            model, adapter = place, None
        if not (name and equals and model):
            raise ValueError(f"--teachers {word}: must be NAME=MODEL or NAME=MODEL:ADAPTER.")
        if name == "mixture" or " + " in name:
            raise ValueError(
                f"--teachers {word}: {name!r} is what results call a mixture of teachers; choose another name."
            )
        if name in named:
            raise ValueError(f"--teachers: {name} is there twice.")
        if (model, adapter) in named.values():
            raise ValueError(f"--teachers: {place} has two names; one is enough.")
        named[name] = model, adapter
    return named


# The flag that asks for a kind of teacher, and the function that creates it from all flags. The first that is set counts:
# a server of text is the teacher only where nobody else is.
TEACHERS = {
    "teacher_cache": "gkd.teachers.cache:TeacherCache.named",
    "teachers": "gkd.teachers.several:SeveralTeachers",
    "teacher_url": "gkd.teachers.servers.remote:RemoteTeacher",
    "teacher_logprobs_url": "gkd.teachers.servers.logprobs:LogprobsTeacher",
    "backend": "gkd.teachers.vllm:VllmTeacher",
    "teacher_model_name_or_path": "gkd.teachers.placed:NamedTeacher",
    "teacher_text_url": "gkd.teachers.servers.text_server:TextServer",
}


def teacher_flag(args: Any) -> str:
    """The flag of `TEACHERS` that counts; the usual one where none is set."""
    given = (name for name in TEACHERS if getattr(args, name, None) is not None)
    return next(given, "teacher_model_name_or_path")


# The flags that the teacher's output depends on: not trust in its code, nor where it is. A cache has its own --top_k.
_NOT_OF_OUTPUT = ("teacher_trust_remote_code", "teacher_device", "teacher_timeout", *SERVERS, *_OF_LOGPROBS)
TEACHER_FLAGS = [item.name for item in fields(TeacherArguments) if item.name not in _NOT_OF_OUTPUT]


TEXT_KEY = "GKD_TEACHER_TEXT_KEY"


@dataclass
class TextArguments:
    """Flags of a server that writes the text of `--seq_kd`; its key comes from the environment, `GKD_TEACHER_TEXT_KEY`."""

    teacher_text_url: str | None = flag(
        None,
        "The text of --seq_kd comes from a server with OpenAI's API, http(s)://HOST[:PORT]/v1 (vLLM, SGLang, llama.cpp, a "
        "cloud). Its key comes from the environment, GKD_TEACHER_TEXT_KEY. Without another teacher the loss is "
        "cross-entropy, for --lmbda 0; else the other is compared with.",
    )
    teacher_text_model: str | None = flag(None, "The model's name there.")
    teacher_text_options: dict[str, Any] | str | None = flag(
        None, "JSON of more settings of a request there, such as '{\"top_p\": 0.9}'; null leaves one of ours out."
    )
    teacher_text_requests: int = flag(16, "At most so many requests at once there, of each process.")

    def check_text(self) -> None:
        """Raises ValueError for flags that exclude each other, an address that is none, or a package that is missing."""
        check_positive(self, ["teacher_text_requests"])
        if self.teacher_text_url is None:
            for name in ("teacher_text_model", "teacher_text_options"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name} has no effect without --teacher_text_url.")
            return
        flag = "--teacher_text_url"
        _check_addresses(flag, [self.teacher_text_url.rstrip("/")], TEXT_KEY, "http://127.0.0.1:8000/v1")
        if not self.teacher_text_model:
            raise ValueError(f"{flag} needs --teacher_text_model, the model's name there.")
        if getattr(self, "teacher_cache", None) is not None:
            raise ValueError(f"--teacher_cache and {flag} exclude each other: the cache has its own text.")
        if not self.seq_kd:
            raise ValueError(f"{flag} writes the text of --seq_kd: add --seq_kd True.")
        fixed = {"model", "messages", "tools", "stream", "n"} & set(self.teacher_text_options or ())
        if fixed:
            raise ValueError(f"--teacher_text_options can't set {', '.join(sorted(fixed))}.")


# The values of --cross_tokenizer.
CROSSINGS = ("off", "shared", "uld")


@dataclass
class CrossTokenizerArguments:
    """The flag for a teacher with another tokenizer."""

    cross_tokenizer: str = flag(
        "off",
        "A teacher with another tokenizer, in this process, behind gkd serve or in a cache. shared: it reads the texts in its own tokens, and the "
        "distributions are compared over the tokens that both have, where both have a token's beginning. uld: the loss of "
        "TRL's GOLD, as a baseline: tokens that one side lacks are compared by rank. off: refused.",
        choices=list(CROSSINGS),
    )

    def check_cross_tokenizer(self) -> None:
        """Raises ValueError for flags that do not go with --cross_tokenizer."""
        if self.cross_tokenizer == "off":
            return
        for name in ("teachers", "teacher_logprobs_url", "teacher_text_url"):
            if getattr(self, name, None) is not None:
                raise ValueError(
                    f"--cross_tokenizer {self.cross_tokenizer} needs one teacher that is a model, in this process, behind "
                    f"gkd serve (--teacher_url) or in a cache (--teacher_cache): --{name} does not go with it."
                )
        if self.teacher_model_name_or_path == SELF:
            raise ValueError(f"--cross_tokenizer: --teacher_model_name_or_path {SELF} has the student's tokenizer.")
        if getattr(self, "teacher_sharded", False) or getattr(self, "student_is_sharded", False):
            raise ValueError(
                "--cross_tokenizer needs whole weights on each GPU: no --teacher_sharded, ZeRO-3 or FSDP."
            )
        if self.train_on != "last_turn":
            raise ValueError(f"--cross_tokenizer {self.cross_tokenizer} needs --train_on last_turn.")
        if self.generation_backend == VLLM:
            raise ValueError(f"--cross_tokenizer: --generation_backend {VLLM} does not go with it yet: take auto.")


@dataclass
class PlacementArguments(TeacherArguments):
    """Flags for where the teacher is; by default it is whole on the student's GPU."""

    teacher_offload: bool = flag(
        False,
        "Keep the teacher in CPU memory, whole for each process. It comes to the GPU once an optimizer step, "
        "and is gone when the student trains.",
    )
    teacher_sharded: bool = flag(
        False,
        "Shard the teacher over the GPUs by FSDP2 (of each machine, if it fits), beside a whole student (DDP, ZeRO-2). "
        "ZeRO-3 and FSDP shard both anyway.",
    )
    teacher_cuda_graph: bool = flag(
        True, "Repeat the teacher's forward on a GPU as a CUDA graph where it can: faster where the CPU is the limit."
    )
    # `--teacher_model_name_or_path self` was given. `adopt_student` then fills in the student's name.
    teacher_is_student: bool = field(init=False, default=False)

    @property
    def uses_fsdp(self) -> bool:
        return bool(self.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"))

    @property
    def student_is_sharded(self) -> bool:
        plugin = getattr(self, "deepspeed_plugin", None)
        return (plugin is not None and plugin.zero_stage == 3) or self.uses_fsdp

    def check_placement(self) -> None:
        """Raises ValueError for flags that exclude each other or the student's parallelism."""
        self.teacher_is_student = self.teacher_model_name_or_path == SELF
        switches = {
            f"--teacher_model_name_or_path {SELF}": self.teacher_is_student,
            "--teacher_device": self.teacher_device is not None,
            "--teacher_offload": self.teacher_offload,
            "--teacher_sharded": self.teacher_sharded,
        }
        if self.teachers is not None and (self.teacher_offload or self.teacher_sharded or self.student_is_sharded):
            raise ValueError(
                "--teachers are whole on the student's GPU or on --teacher_device: leave out --teacher_offload and "
                "--teacher_sharded, and shard no student (DDP, ZeRO-2)."
            )
        chosen = [flag for flag, is_set in switches.items() if is_set]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other: choose one.")
        if chosen and self.student_is_sharded and not self.teacher_sharded:
            raise ValueError(
                f"{chosen[0]} needs whole weights on each GPU, but ZeRO-3 and FSDP shard student and teacher: use DDP or "
                "ds_configs/zero2.yaml, or drop the flag."
            )
        if self.teacher_load_in_4bit or self.teacher_load_in_8bit:
            for flag in {"--teacher_offload", "--teacher_sharded"} & set(chosen):
                raise ValueError(f"{flag} does not work with a 4- or 8-bit teacher: choose one of them.")
        if self.teacher_is_student:
            defaults = {item.name: item.default for item in fields(TeacherArguments)}
            for name in TEACHER_FLAGS[1:]:  # all but the name
                if getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"--{name} does not apply to --teacher_model_name_or_path {SELF}: the teacher is the student's "
                        "base, loaded as the student's flags say."
                    )


def adopt_student(student_args: Any, args: PlacementArguments) -> None:
    """For `--teacher_model_name_or_path self`, copies the student's flags to the teacher's.

    Raises ValueError if the student has no adapter: teacher and student would be the same.
    """
    if not args.teacher_is_student:
        return
    if not (student_args.use_peft or student_args.student_adapter):
        raise ValueError(
            f"--teacher_model_name_or_path {SELF} takes the student without its adapter, and there is none: add "
            "--use_peft or --student_adapter."
        )
    args.teacher_model_name_or_path = student_args.model_name_or_path
    args.teacher_revision = student_args.model_revision
    args.teacher_dtype = student_args.dtype or "auto"
    args.teacher_load_in_4bit, args.teacher_load_in_8bit = student_args.load_in_4bit, student_args.load_in_8bit
