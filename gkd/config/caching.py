"""The flags of `gkd cache`. Those that `gkd train` has too mean the same."""

import os
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch

from gkd.config.generation import VLLM, GenerationArguments, check_vllm
from gkd.config.parser import FlagParser
from gkd.config.teacher import TeacherArguments, teacher_flag
from gkd.config.values import check_positive, check_room, check_seed, flag, parse_objects

# Flags that an engine of vLLM can't heed: it tells log-probabilities of plain weights, at temperature 1.
_NOT_OF_BACKEND = (
    *"keep loss_temperature generation_backend teachers teacher_url teacher_logprobs_url teacher_adapter".split(),
    *"teacher_load_in_4bit teacher_load_in_8bit teacher_model_init_kwargs teacher_device".split(),
)


@dataclass(kw_only=True)
class CacheArguments(GenerationArguments, TeacherArguments):
    output_dir: str = field(metadata={"help": "Where the cache goes; a caching that was cut off goes on there."})
    model_name_or_path: str | None = flag(
        None, "The student: its tokenizer and vocabulary, no weights. Not with --cross_tokenizer, but see there."
    )
    dataset_name: str = field(
        metadata={"help": "A JSON, JSONL, CSV, TSV or Parquet file, a folder, or a hub id, as of train_gkd.py."}
    )
    keep: str = flag(
        "topk",
        "What is kept of the teacher at each scored token: its --top_k likeliest tokens, or its last hidden states, "
        "which with its output head are all that it says: exact for each divergence, but 8 KB a token at width 4096 in "
        "bf16.",
        choices=["topk", "hidden"],
    )
    top_k: int = flag(64, "How many of the teacher's likeliest tokens are kept.")
    cross_tokenizer: str = flag(
        "off",
        "shared: for students of any tokenizer, which gkd train --cross_tokenizer shared takes. The cache is then in the "
        "teacher's own tokens and chat template, and keeps the rows. With --teacher_logprobs_url, --model_name_or_path names the "
        "teacher, for its tokenizer.",
        choices=["off", "shared"],
    )
    dataset_config: str | None = flag(None, "Of a dataset on the hub.")
    dataset_train_split: str = flag("train", "The split to take.")
    train_on: str = flag("last_turn", "Which assistant turns are scored.", choices=["last_turn", "all_turns"])
    chat_template_kwargs: dict[str, Any] | str | None = flag(None, "JSON with variables for the chat template.")
    system_as_user: bool = flag(False, "As of train_gkd.py.")
    chat_template_path: str | None = flag(None, "As of train_gkd.py.")
    eos_token: str | None = flag(None, "As of train_gkd.py.")
    pad_token: str | None = flag(None, "As of train_gkd.py.")
    max_length: int | None = flag(1024, "Of prompt and completion together.")
    max_new_tokens: int = flag(128, "Of a completion.")
    seq_kd: bool = flag(False, "The teacher writes the text, not the dataset.")
    temperature: float = flag(0.9, "Of that writing.")
    seed: int = flag(42, "Of that writing.")
    loss_temperature: float = flag(1.0, "Of the probabilities that are kept.")
    model_revision: str = flag("main", "Branch, tag or commit of the student.")
    trust_remote_code: bool = flag(False, "Run code that comes with the student.")
    batch_size: int | None = flag(
        None, "Rows that the teacher reads, and writes, together (16; of --teacher_logprobs_url and --backend 128)."
    )
    rows_per_shard: int = flag(512, "What is written, and goes on, at a time.")
    backend: str | None = flag(
        None,
        "vllm: an engine of vLLM has the teacher, writes its text and tells its --top_k likeliest tokens, for a teacher that is "
        "too large for one GPU. By default transformers has it.",
        choices=[VLLM],
    )
    tensor_parallel_size: int = flag(1, "Of --backend vllm: GPUs that share each layer of the teacher.")
    vllm_memory: float | None = flag(
        None,
        "The share of each GPU's memory that an engine of vLLM takes: 0.9 with --backend vllm, whose it is alone, 0.3 with "
        "--generation_backend vllm, beside the teacher's weights here.",
    )

    def __post_init__(self):
        parse_objects(self, ("chat_template_kwargs", "teacher_model_init_kwargs"))
        check_positive(
            self,
            "top_k max_new_tokens temperature loss_temperature batch_size rows_per_shard tensor_parallel_size".split(),
        )
        check_seed(self, "seed")
        defaults = {f.name: f.default for f in fields(self)}
        self._settle_crossing()
        self._settle_served(defaults)
        self._settle_backend(defaults)
        apart = self.backend is not None or self.teacher_logprobs_url is not None
        self.batch_size = self.batch_size or (128 if apart else 16)
        for name in ("top_k", "loss_temperature"):
            if self.keep == "hidden" and getattr(self, name) != defaults[name]:
                raise ValueError(f"--{name} has no effect on --keep hidden, which keeps the whole: leave it out.")
        if self.generates:
            check_room(self)
        if getattr(self, name := teacher_flag(self)) is None:
            raise ValueError(f"--{name} is required, or --teacher_url, --teacher_logprobs_url or --teachers.")
        self.check_teacher()
        self.check_generation()
        if self.keep == "hidden" and self.teachers is not None:
            raise ValueError("--keep hidden keeps one output head: cache the rows of each of --teachers apart.")

    def _settle_crossing(self) -> None:
        """Raises ValueError for flags that do not go with --cross_tokenizer, or for no student without it."""
        if self.cross_tokenizer == "off":
            if self.model_name_or_path is None:
                raise ValueError("--model_name_or_path is required: the student, for its tokenizer.")
            return
        asked = f"--cross_tokenizer {self.cross_tokenizer}"
        if self.keep == "hidden":
            raise ValueError(f"{asked} does not go with --keep hidden yet: keep the top k, or train with the teacher.")
        if self.teachers is not None:
            raise ValueError(f"{asked} takes one teacher: --teachers does not go with it.")
        if self.train_on != "last_turn":
            raise ValueError(f"{asked} needs --train_on last_turn.")
        if self.model_name_or_path is None and self.teacher_logprobs_url is not None:
            raise ValueError(
                f"{asked} with --teacher_logprobs_url needs --model_name_or_path, the teacher there: its tokenizer."
            )
        if self.model_name_or_path is None and self.teacher_model_name_or_path is not None:
            self.model_name_or_path, self.model_revision = self.teacher_model_name_or_path, self.teacher_revision
            self.trust_remote_code = self.teacher_trust_remote_code

    def _settle_served(self, defaults: dict[str, Any]) -> None:
        """What a server of log-probabilities tells is what is kept. Raises ValueError where that can't be."""
        if self.teacher_logprobs_url is None:
            return
        if self.keep == "hidden":
            raise ValueError(
                "--keep hidden needs hidden states, and --teacher_logprobs_url tells none: use --teacher_url."
            )
        if self.top_k not in (defaults["top_k"], self.teacher_top_k):
            raise ValueError(
                f"--top_k {self.top_k}: with --teacher_logprobs_url as many are kept as --teacher_top_k asks for "
                f"({self.teacher_top_k}): give that alone."
            )
        self.top_k = self.teacher_top_k

    def _settle_backend(self, defaults: dict[str, Any]) -> None:
        """Raises ValueError for what does not go with --backend, or without it."""
        if self.backend is None:
            if self.tensor_parallel_size != 1:
                raise ValueError(
                    f"--tensor_parallel_size {self.tensor_parallel_size} has no effect without --backend vllm."
                )
            self.vllm_memory = 0.3 if self.vllm_memory is None else self.vllm_memory
            return
        asked = f"--backend {self.backend}"
        self.vllm_memory = 0.9 if self.vllm_memory is None else self.vllm_memory
        for name in _NOT_OF_BACKEND:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"--{name} does not go with {asked}: leave one of the two out.")
        if self.teacher_model_name_or_path is None:
            raise ValueError(f"{asked} needs --teacher_model_name_or_path, a model that it loads.")
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise ValueError(f"{asked} starts its own processes: start one, with --tensor_parallel_size.")
        check_vllm(asked)
        if 0 < torch.cuda.device_count() < self.tensor_parallel_size:
            raise ValueError(
                f"--tensor_parallel_size {self.tensor_parallel_size}: there are {torch.cuda.device_count()} visible GPUs."
            )

    @property
    def generates(self) -> bool:
        """Whether the teacher writes text."""
        return self.seq_kd


make_parser = partial(FlagParser, CacheArguments)
