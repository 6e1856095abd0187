"""Compares flags with the resumed run's: changes are reported and applied, or refused with a command for a new run."""

import hashlib
import json
import math
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from transformers.utils import cached_file

from gkd.data.encoding import rows_fingerprint
from gkd.metrics.divergences import DIVERGENCE_FLAGS
from gkd.runs.checkpoints import step_of
from gkd.runs.record import NAME, arguments_of, changes_in, history_in, is_guarded, mapping, read_record
from gkd.runs.typed import retyped, start_of

# Flags that may not change on resume, by subject. Changes of others apply from the resumed step and are reported.
_REFUSED = {
    "seed": "seed data_seed",
    "data": "dataset_streaming train_sampling_strategy length_column_name dataloader_drop_last accelerator_config",
    "optimizer": "optim optim_args optim_target_modules",
    "LoRA": "use_peft lora_r lora_alpha lora_target_modules lora_target_parameters lora_modules_to_save use_rslora use_dora",
    "student": "load_in_4bit load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant",
    "teacher": "teacher_load_in_4bit teacher_load_in_8bit teacher_model_init_kwargs cross_tokenizer",
}
_SUBJECT = {flag: subject for subject, flags in _REFUSED.items() for flag in flags.split()}

# Flags compared by a fingerprint of what they name, which may have moved: subject, and the flag of its version.
_NAMED = {
    "model_name_or_path": ("student", "model_revision"),
    "student_adapter": ("student", None),
    "teacher_model_name_or_path": ("teacher", "teacher_revision"),
    "teacher_adapter": ("teacher", None),
    "teacher_cache": ("teacher", None),
    "teacher_url": ("teacher", None),
    "teacher_logprobs_url": ("teacher", None),
    "teachers": ("teacher", None),
}

# Flags that decide what tokens rows have: refused only if the fingerprint of the rows has changed.
_OF_ROWS = (
    "dataset_name dataset_config dataset_train_split max_length max_new_tokens train_on chat_template_kwargs "
    "system_as_user eos_token pad_token"
).split()

# Flags that identify a stream, which has no fingerprint.
_SOURCE = ("dataset_name", "dataset_config", "dataset_train_split")
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")  # their product with the ranks is compared

# Flags that affect the steps that are left.
_STEERING = set(
    "learning_rate lr_scheduler_type warmup_steps warmup_ratio weight_decay max_grad_norm adam_beta1 adam_beta2 "
    "adam_epsilon lmbda lmbda_schedule lmbda_steps lmbda_probe_steps rollout_guard seq_kd kd_ratio temperature "
    "loss_temperature steps_per_generation router_aux_loss_coef teacher_text_model teacher_text_options teacher_top_k".split()
) | set(DIVERGENCE_FLAGS)
# Flags whose changes are not reported.
_SILENT = set(
    "output_dir resume_from_checkpoint eval_on_start preflight local_rank do_train do_eval do_predict disable_tqdm "
    "log_level log_level_replica dataset_num_proc vllm_memory teacher_timeout teacher_text_requests "
    "teacher_logprobs_requests".split()
)

# Of a config: where and with what it was saved, which says nothing of the weights.
_UNSTABLE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "base_model_name_or_path")
_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
_BLOCKS, _BLOCK, _LONGEST_HEADER = 64, 1024, 2**26


@dataclass
class Resumed:
    """The resumed run as it was at its checkpoint; for a new run all is empty but `fingerprints`."""

    checkpoint: str | None = None
    step: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)  # the values in force when the checkpoint was written
    history: list[dict[str, Any]] = field(default_factory=list)  # of run.json, up to the checkpoint
    record: dict[str, Any] = field(default_factory=dict)  # all of run.json
    changed: dict[str, list[Any]] = field(default_factory=dict)  # {flag: [old, new]} from `step` on
    # Of models and rows as they are now, by flag; and how the optimizer's state is sharded.
    fingerprints: dict[str, str | None] = field(default_factory=dict)

    def check_rows(self, groups: tuple[Any, ...], train_set: Dataset | IterableDataset) -> "Resumed":
        """Compares the rows and the flags that `compare` lets pass, once all are settled, and prints what changes.

        Raises:
            ValueError: the rows have changed, or no step is left for the changes.
        """
        return _on_main_process(groups[-1], lambda: self._check_rows(groups, train_set))

    def _check_rows(self, groups: tuple[Any, ...], train_set: Dataset | IterableDataset) -> "Resumed":
        new, old = arguments_of(groups), self.arguments
        stream = isinstance(train_set, IterableDataset)
        if not stream:
            self.fingerprints["dataset_name"] = f"rows {rows_fingerprint(train_set, xxhash.xxh3_128())}"
        same = self.same("dataset_name")
        refused = {}
        for flag, value in new.items():
            if flag in _SILENT or flag not in old or _normal(old[flag]) == _normal(value) or flag in self.changed:
                continue
            if flag == "rollout_guard" and is_guarded(old) == is_guarded(new):
                continue
            if flag in (_OF_ROWS if same is False else _SOURCE if stream else ()):
                refused[_change(flag, old[flag], value)] = "data"
            elif not (flag in _SUBJECT and not _uses_lora(old, new)):  # LoRA's flags, without LoRA
                self.changed[flag] = [old[flag], value]
        if same is False and not refused:
            refused[f"dataset_name {_shown(new['dataset_name'])} (its rows have changed)"] = "data"
        if refused:
            raise ValueError(self.refusal(refused, groups[-1]))
        self._check_length(groups[-1], None if stream else len(train_set))
        for name, (before, value) in self.changed.items():
            moved = " (moved, the same content)" if self.same(name) else ""
            print(f"{_change(name, before, value)} from step {self.step}{moved}")
        return self

    def _check_length(self, args: Any, rows: int | None) -> None:
        """Raises ValueError if no step is left for the changes to apply to."""
        total = args.max_steps
        if total <= 0 and rows is not None:
            batches = -(-rows // (args.per_device_train_batch_size * args.world_size))
            total = math.ceil(args.num_train_epochs * -(-batches // args.gradient_accumulation_steps))
        steering = [_change(name, *self.changed[name]) for name in sorted(self.changed.keys() & _STEERING)]
        if self.checkpoint is None or total <= 0 or self.step < total or (self.step == total and not steering):
            return
        what = f"so this would apply to none: {'; '.join(steering)}" if steering else f"{self.step} of {total}"
        raise ValueError(
            f"{self.checkpoint} has all steps of this run, {what}. Go back to the old values, or raise --max_steps or "
            "--num_train_epochs."
        )

    def same(self, flag: str) -> bool | None:
        """Whether what a flag names has the recorded fingerprint; None if one of the two is not known."""
        before, now = mapping(self.record.get("fingerprints")).get(flag), self.fingerprints.get(flag)
        if not (isinstance(before, str) and isinstance(now, str)) or before.split(" ")[0] != now.split(" ")[0]:
            return None
        return before == now

    def refusal(self, refused: dict[str, str], args: Any) -> str:
        """The message of a refusal. `refused`: subject by change."""
        subjects = set(refused.values())
        weights = "" if "student" in subjects else " from these weights"
        return (
            f"{self.checkpoint} can't go on with a changed {', '.join(sorted(subjects))}: {'; '.join(refused)}. Go back to "
            f"the old values, or start a new run{weights}: {self.new_run_command(subjects, args)}"
        )

    def new_run_command(self, subjects: set[str], args: Any) -> str:
        """The command as it was typed, changed to start a new run from the checkpoint's weights.

        If the student has changed, it starts from the new one. LoRA of another shape starts from merged weights.
        """
        folder = _unused_name(f"{args.output_dir.rstrip('/')}-from-{self.step}")
        new = {"output_dir": folder}
        if "student" in subjects:
            return retyped(new)
        if not Path(self.checkpoint, "adapter_config.json").is_file():
            return retyped(new | {"model_name_or_path": self.checkpoint})
        if "LoRA" not in subjects:
            return retyped(new | {"student_adapter": self.checkpoint, "use_peft": "False"})
        merged = new["model_name_or_path"] = _unused_name(f"{folder}-start")
        if args.teacher_is_student:  # else the merged student would be its own teacher
            new["teacher_model_name_or_path"] = args.teacher_model_name_or_path
        *python, program = start_of(sys.argv[0])
        beside = Path(program).with_name("export_model.py")  # of train_gkd.py
        export = [str(beside)] if Path(program).suffix == ".py" else [program, "export"]
        return f"{shlex.join([*python, *export, self.checkpoint, '-o', merged])} && {retyped(new)}"


def compare(
    checkpoint: str | None, groups: tuple[Any, ...], fingerprints: Mapping[str, str] = MappingProxyType({})
) -> Resumed:
    """Compares the parsed arguments with the record of the run that `checkpoint` belongs to, before anything loads.

    The main process reads, and all ranks get the same.

    Args:
        groups: the dataclasses of arguments, GKDArguments last.
        fingerprints: of what is not on disk or the hub, see `gkd.teachers.base.Teacher`.

    Raises:
        ValueError: a change that a run can't go on with; or the record is damaged.
    """
    return _on_main_process(groups[-1], lambda: _compare(checkpoint, groups, fingerprints))


def _on_main_process(args: Any, work: Callable[[], Resumed]) -> Resumed:
    problem = result = None
    if args.process_index == 0:
        try:
            result = work()
        except (ValueError, OSError) as error:
            problem = str(error)
    problem, result = broadcast_object_list([problem, result])
    if problem is not None:
        raise ValueError(problem)
    return result


def _compare(checkpoint: str | None, groups: tuple[Any, ...], fingerprints: Mapping[str, str]) -> Resumed:
    args, new = groups[-1], arguments_of(groups)
    resumed = Resumed(checkpoint, fingerprints={**_fingerprints(new), **fingerprints, "sharding": _sharding(args)})
    if checkpoint is None:
        return resumed
    resumed.step = step_of(checkpoint)
    if not Path(checkpoint).resolve().with_name(NAME).is_file():
        print(f"{checkpoint} has no {NAME} beside it, so what this command line changes is not known.")
        return resumed
    resumed.record = read_record(Path(checkpoint).resolve().parent)
    resumed.arguments, resumed.history = _as_of(resumed.record, resumed.step)
    resumed.arguments.setdefault("divergence", "jsd")  # an older gkd had no other
    if refused := _refused_models(resumed, new) | _refused_batch(resumed, new, args.world_size):
        raise ValueError(resumed.refusal(refused, args))
    return resumed


def _as_of(record: dict[str, Any], step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The values that the steps before `step` were trained with, and the history up to there."""
    first, *later = history_in(record) or [{}]
    if "arguments" not in first:  # an older gkd kept no history
        return record["arguments"], [{"step": 0, "arguments": record["arguments"]}]
    changes = [change for change in changes_in(record) if change[0] < step]
    kept = {change[0] for change in changes}
    values = mapping(first["arguments"]) | {name: new for _, name, _, new in changes}
    return values, [first, *(entry for entry in later if entry.get("step") in kept)]


def _refused_models(resumed: Resumed, new: dict[str, Any]) -> dict[str, str]:
    """Refused changes (subject by change) of models, by fingerprint, and of flags that a state depends on."""
    old, prints, refused = resumed.arguments, mapping(resumed.record.get("fingerprints")), {}
    if resumed.same("sharding") is False:
        refused[_change("sharding", prints["sharding"], resumed.fingerprints["sharding"])] = "optimizer"
    settled = {version for flag, (_, version) in _NAMED.items() if version and resumed.same(flag) is not None}
    for flag, value in new.items():
        if flag not in old:  # recorded by an older gkd
            continue
        before, differs = old[flag], _normal(old[flag]) != _normal(value)
        if flag in _NAMED:
            subject, _ = _NAMED[flag]
            if resumed.same(flag) is False:
                more = "" if differs else f" (was {_shown(prints[flag])}, is {_shown(resumed.fingerprints[flag])})"
                refused[_change(flag, before, value) + more] = subject
            elif differs and None in (before, value):
                refused[_change(flag, before, value)] = subject
        elif differs and flag in settled:
            resumed.changed[flag] = [before, value]
        elif differs and flag in _SUBJECT and (_SUBJECT[flag] != "LoRA" or _uses_lora(old, new)):
            refused[_change(flag, before, value)] = _SUBJECT[flag]
    return refused


def _refused_batch(resumed: Resumed, new: dict[str, Any], ranks: int) -> dict[str, str]:
    """Refuses another number of rows per step. The same number from another number of ranks is noted as a change."""
    old, before = resumed.arguments, mapping(resumed.record.get("hardware")).get("ranks")
    factors = [old.get(flag) for flag in _BATCH] + [before]
    if not all(isinstance(factor, int) for factor in factors):
        return {}
    now = [*(new[flag] for flag in _BATCH), ranks]
    if math.prod(factors) == math.prod(now):
        if before != ranks:
            resumed.changed["ranks"] = [before, ranks]
        return {}
    products = [f"{device} x {accumulated} x {count}" for device, accumulated, count in (factors, now)]
    rows = f"batch {math.prod(factors)} -> {math.prod(now)} rows a step"
    return {f"{rows} (per device x accumulation x ranks: {' -> '.join(products)})": "batch"}


def _uses_lora(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return bool(old.get("use_peft") or new.get("use_peft"))


def _unused_name(folder: str) -> str:
    names = chain([folder], (f"{folder}-{number}" for number in count(2)))
    return next(name for name in names if not Path(name).exists())


def _fingerprints(arguments: dict[str, Any]) -> dict[str, str | None]:
    """Fingerprints by flag, of each model, adapter and cache that is named and would be loaded here."""
    return {
        flag: fingerprint(arguments[flag], arguments[version] if version else None)
        for flag, (_, version) in _NAMED.items()
        if flag not in ("teacher_url", "teacher_logprobs_url", "teachers")  # which the teacher itself tells
        and arguments[flag] is not None
        and not (flag == "teacher_model_name_or_path" and arguments["teacher_cache"])
    }


def fingerprint(name: str, revision: str | None) -> str | None:
    """Identifies a model, adapter or teacher cache by content: `files ...` or, from the hub, `commit ...`; or None."""
    if Path(name).is_dir():
        return f"files {_of_files(Path(name))}"
    try:
        return f"commit {Path(cached_file(name, 'config.json', revision=revision)).parent.name}"
    except (OSError, ValueError, TypeError):  # loading it reports what is wrong
        return None


def _of_files(folder: Path) -> str:
    """Of weights it reads names, shapes, sizes, and blocks at even distances: training changes all of them."""
    digest = hashlib.sha256()
    for path in (folder / name for name in ("config.json", "adapter_config.json", "manifest.json")):
        if path.is_file():
            content = path.read_bytes()
            with suppress(ValueError, AttributeError):  # damaged, or not an object: compared as it is
                kept = {key: value for key, value in json.loads(content).items() if key not in _UNSTABLE}
                content = json.dumps(kept, sort_keys=True).encode()
            digest.update(path.name.encode() + content)
    for path in sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(min(int.from_bytes(file.read(8), "little"), _LONGEST_HEADER)))  # of safetensors
            for start in range(0, size, max(size // _BLOCKS, _BLOCK)):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def _sharding(args: Any) -> str:
    """How the optimizer state is sharded: each kind reads only its own, and ZeRO only over as many ranks."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        return f"by ZeRO-{plugin.zero_stage} over {args.world_size} ranks"
    return "by FSDP" if args.student_is_sharded else "by nothing"


def _change(flag: str, old: Any, new: Any) -> str:
    return f"{flag} {_shown(new)}" if _normal(old) == _normal(new) else f"{flag} {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    """A value as text that is safe for a terminal, whoever wrote it."""
    return str(value) if isinstance(value, str) and value.isprintable() else repr(value)


def _normal(value: Any) -> Any:
    """A value for comparison: the order of a list of words has no meaning."""
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
