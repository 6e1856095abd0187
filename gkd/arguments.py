"""The command line: TRL's dataclasses with our flags added, and a parser that helps."""

import importlib.util
import itertools
import json
import math
import os
import re
import sys
import warnings
from argparse import SUPPRESS, Action
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_origin, get_type_hints

import torch
import yaml
from accelerate.utils import parse_flag_from_env

from gkd.fallback import one_line
from gkd.paths import PATHS, check_adapter, expand_user, read_text
from gkd.placement import PlacementArguments
from gkd.results import more_is_better
from gkd.run_record import is_secret, public
from gkd.start import CommandParser, ShowAll, unknown_flag
from gkd.task_metrics import METRICS, TaskMetrics
from gkd.trl_compat import GKDConfig, ModelConfig, ScriptArguments, TrlParser

# Flags that current libraries dropped but people's commands still hold: what stands in for each, and what we say.
DEPRECATED_FLAGS = {
    "torch_dtype": ("dtype", "--torch_dtype is deprecated: use --dtype."),
    "dataset_batch_size": (None, "--dataset_batch_size is deprecated and ignored: rows are tokenized one by one."),
    "max_seq_length": ("max_length", "--max_seq_length is deprecated: use --max_length."),
    "evaluation_strategy": ("eval_strategy", "--evaluation_strategy is deprecated: use --eval_strategy."),
}

# SFT options that GKD inherits and that mean nothing here: set, they are an error, not a silent no-op.
_NOT_FOR_GKD = {
    "packing": "rows are never packed",
    "padding_free": "batches are padded",
    "assistant_only_loss": "only assistant tokens are ever scored; see --train_on",
    "completion_only_loss": "only completions are ever scored; see --train_on",
    "loss_type": "the loss is the divergence; see --beta and --kd_ratio",
    "truncation_mode": "a long prompt loses its oldest turns but keeps the system prompt; see --max_length",
    "shuffle_dataset": "rows are drawn in random order already; see --train_sampling_strategy",
    "label_smoothing_factor": "the loss has no one-hot target",
}


# What is wrong with a flag that asks for the teacher beside --teacher_cache, and what to do.
NO_TEACHER = (
    "needs the teacher, and --teacher_cache loads none: evaluate afterwards, by eval_gkd.py RUN --dataset_name ROWS."
)


# Flags that take JSON, or the path of a file with it; those of _VALID_DICT_FIELDS that are not here take JSON alone.
_OR_A_FILE = {"accelerator_config", "fsdp_config", "deepspeed"}

# Numbers that must be above 0.
_POSITIVE = (
    "temperature loss_temperature max_new_tokens generation_batch_size steps_per_generation max_skipped_steps "
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps adam_epsilon"
).split()


def _need(flag: str, package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{flag} needs {package}, which is not installed: pip install -e '.[{extra}]'.")


def json_object(flag: str, value: Any) -> dict[str, Any] | None:
    """The value of a flag that takes a JSON object, parsed if it is text.

    Raises:
        ValueError: it is no JSON, or no object. The value is not repeated: it may hold a token.
    """
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"--{flag} is not JSON: {error.msg}, character {error.pos}.") from None
    if not isinstance(value, dict | None):
        raise ValueError(f"--{flag} must be a JSON object such as '{{\"name\": 1}}'.")
    return value


def check_teacher_bits(args: Any) -> None:
    """Raises ValueError for a teacher in 4 and in 8 bits at once, or in either without bitsandbytes."""
    if args.teacher_load_in_4bit and args.teacher_load_in_8bit:
        raise ValueError("Choose one of --teacher_load_in_4bit and --teacher_load_in_8bit.")
    for bits in ("4", "8"):
        if getattr(args, f"teacher_load_in_{bits}bit"):
            _need(f"--teacher_load_in_{bits}bit", "bitsandbytes", "quantization")


def check_room(args: Any) -> None:
    """Raises ValueError where a completion leaves no room for a prompt."""
    if args.max_length is not None and args.max_new_tokens >= args.max_length:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in --max_length {args.max_length}: a "
            "sequence is prompt and completion together."
        )


def check_positive(args: Any, names: Iterable[str]) -> None:
    """Raises ValueError for a number that is not above 0, or has no end; None, for one that is not set, passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be positive, not {value}.")


def check_seed(args: Any, *names: str) -> None:
    """Raises ValueError for a seed that NumPy does not take; None passes."""
    for name in names:
        if not 0 <= (getattr(args, name) or 0) < 2**32:
            raise ValueError(f"--{name} must lie in [0, {2**32 - 1}], not {getattr(args, name)}.")


@dataclass
class DataArguments(ScriptArguments):
    """TRL's ScriptArguments; `dataset_name` may also be a local file or folder."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Training data: a JSON, JSONL, CSV, TSV or Parquet file, a folder, or a hub id."},
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Held-out rows, in any form of --dataset_name: evaluated before and after training, and between by "
            "--eval_strategy, which without this flag takes the test split of --dataset_name."
        },
    )


@dataclass
class StudentArguments(ModelConfig):
    """TRL's ModelConfig with the student's extras."""

    student_adapter: str | None = field(
        default=None,
        metadata={"help": "Folder of a LoRA adapter of the student: training goes on from it."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.use_peft:
            if self.lora_r < 1:
                raise ValueError(f"--lora_r must be at least 1, not {self.lora_r}.")
            if not 0 <= self.lora_dropout < 1:
                raise ValueError(f"--lora_dropout must lie in [0, 1), not {self.lora_dropout}.")
            if self.lora_task_type != "CAUSAL_LM":
                raise ValueError(f"--lora_task_type {self.lora_task_type}: the student is a CAUSAL_LM.")
        if isinstance(self.lora_target_modules, str) and re.fullmatch(r"[\w.]+", self.lora_target_modules):
            # TRL makes a pattern of a single name, which then has to match whole paths.
            self.lora_target_modules = [self.lora_target_modules]
        if self.load_in_4bit or self.load_in_8bit:
            flag = "--load_in_4bit" if self.load_in_4bit else "--load_in_8bit"
            if not (self.use_peft or self.student_adapter):
                raise ValueError(f"{flag} trains through LoRA only: add --use_peft.")
            _need(flag, "bitsandbytes", "quantization")
        if self.student_adapter is not None:
            if self.use_peft:
                raise ValueError("--student_adapter goes on with an adapter that exists: drop --use_peft.")
            check_adapter("--student_adapter", self.student_adapter)


@dataclass
class EvaluationArguments:
    """How models are evaluated, in training and by eval_gkd.py."""

    metrics: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Task metrics on held-out rows, against their answers or, where they have none, the teacher's: "
            f"{', '.join(METRICS)}."
        },
    )
    scorer: str | None = field(
        default=None,
        metadata={"help": "A metric of your own, MODULE:FUNCTION of (completion, row) that returns a number."},
    )
    eval_temperature: float = field(default=0.0, metadata={"help": "Of the completions in evaluation; 0 is greedy."})

    def check_evaluation(self) -> None:
        """Raises ValueError for a metric, scorer or temperature that can't be used."""
        TaskMetrics(self.metrics, self.scorer)
        if not 0 <= self.eval_temperature < math.inf:
            raise ValueError(f"--eval_temperature must be a number from 0 on, not {self.eval_temperature}.")


@dataclass
class GKDArguments(GKDConfig, EvaluationArguments, PlacementArguments):
    """TRL's GKDConfig (lmbda, beta, seq_kd, temperature, max_new_tokens, ...) with ours."""

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The teacher: a folder, a hub id, or `self`, a LoRA student's own base without the adapter."
        },
    )
    loss_temperature: float = field(
        default=1.0,
        metadata={"help": "Temperature of both distributions inside the divergence (--temperature: of sampling)."},
    )
    kd_ratio: float = field(
        default=1.0,
        metadata={
            "help": "Share of the divergence in the loss on dataset or teacher text; the rest is cross-entropy. 0.1 "
            "with --lmbda 0 --beta 0 is torchtune's KD loss. The student's own text is never a target."
        },
    )
    train_on: str = field(
        default="last_turn",
        metadata={
            "help": "Which assistant turns of a dataset conversation are scored.",
            "choices": ["last_turn", "all_turns"],
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "JSON with variables for the chat template, e.g. '{\"enable_thinking\": false}'."},
    )
    system_as_user: bool = field(
        default=False,
        metadata={"help": "Put a system prompt before the first question, for templates that take no system turn."},
    )
    preflight: str = field(
        default="on",
        metadata={
            "help": "Show an example, lengths, stop tokens and the memory a run will need before weights load; `only` "
            "stops there.",
            "choices": ["on", "off", "only"],
        },
    )
    generation_batch_size: int = field(
        default=64,
        metadata={"help": "At most this many prompts of an optimizer step generate together on a device."},
    )
    generation_backend: str = field(
        default="auto",
        metadata={
            "help": "static: one CUDA graph a token, on a static KV cache; dynamic: transformers' generate; auto: static "
            "on a GPU where the model allows it.",
            "choices": ["auto", "static", "dynamic"],
        },
    )
    steps_per_generation: int = field(
        default=1,
        metadata={
            "help": "Generate the student's text of this many optimizer steps at once. 1 is exactly on-policy; more is "
            "faster, with text up to N - 1 steps old. The "
            "teacher's text is written ahead as much as --generation_batch_size holds, if it is cached and weights are whole."
        },
    )
    teacher_text_cache: str = field(
        default="auto",
        metadata={
            "help": "Where --seq_kd keeps the teacher's text, so that later epochs and restarts reuse it: a folder, which "
            "runs may share; auto: OUTPUT_DIR/_teacher_text; off: sample anew each time."
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder that cache_teacher.py made: rows, and what the teacher says of them, come from there and no "
            "teacher loads. For λ = 0, and small β: a reverse KL needs more of the teacher than its top k."
        },
    )
    log_completions: int = field(
        default=0,
        metadata={"help": "Print this many completions of each writer at each log, and send them to --report_to."},
    )
    teacher_dtype: str = field(
        default="auto",
        metadata={
            "help": "The teacher's dtype; auto keeps that of its weights.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    teacher_cuda_graph: bool = field(
        default=True,
        metadata={
            "help": "Repeat the teacher's forward on a GPU as a CUDA graph where it can: faster where the CPU is the limit."
        },
    )
    teacher_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the teacher."})
    teacher_adapter: str | None = field(
        default=None, metadata={"help": "Folder of a LoRA adapter of the teacher, merged on load."}
    )
    teacher_load_in_4bit: bool = field(default=False, metadata={"help": "Load the teacher in 4 bit (NF4)."})
    teacher_load_in_8bit: bool = field(default=False, metadata={"help": "Load the teacher in 8 bit."})
    # TRL's flag, which there is for both models.
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run model code that comes with the student. The teacher's has a flag of its own."},
    )
    teacher_trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that comes with the teacher."}
    )

    # TRL's flag; its default there is what the student's config says, 0.001 for most.
    router_aux_loss_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the load-balancing loss of a student that is a mixture of experts, as transformers computes "
            "it for each micro-batch; logged as aux_loss."
        },
    )

    max_skipped_steps: int = field(
        default=5,
        metadata={
            "help": "An optimizer step with a NaN or infinite loss or gradient is skipped; so many in a row stop the run (with "
            "--fp16 at least 40, since its scale is found by skipping)."
        },
    )
    auto_micro_batch: bool = field(
        default=False,
        metadata={
            "help": "Where memory is too short, halve the micro-batch and keep the global batch: at once in a single "
            "process, on the next start with several. Generations are halved too."
        },
    )

    # transformers' default replaces a NaN loss in the log by another, and looks for it at each micro-batch, which waits
    # for the GPU.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN and inf losses from the log."})

    _VALID_DICT_FIELDS = [*GKDConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]

    def __post_init__(self):
        self._check_ranges()
        for name in sorted(set(self._VALID_DICT_FIELDS) - _OR_A_FILE):
            setattr(self, name, json_object(name, getattr(self, name)))
        if self.generates:
            check_room(self)
        check_teacher_bits(self)
        self.check_evaluation()
        if self.router_aux_loss_coef and (self.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")):
            # The model's own forward, which the term comes from, crashes on GPUs under FSDP2.
            raise ValueError("--router_aux_loss_coef is not supported under FSDP: use DDP, ZeRO-2 or ZeRO-3.")
        for name in ("deepspeed", "fsdp_config", "accelerator_config"):
            if isinstance(path := getattr(self, name), str) and os.path.isfile(path):
                read_text(path)  # a decode error of the libraries would not name it
        if self.teacher_cache is not None:
            for name in ("eval_on_start", "eval_strategy", "metrics", "scorer", "load_best_model_at_end"):
                if getattr(self, name) not in (None, False, [], "no"):
                    raise ValueError(f"--{name} {NO_TEACHER}")
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            # transformers thinks more is better of any name that does not end in "loss".
            self.greater_is_better = more_is_better(self.metric_for_best_model)
        if self.deepspeed is not None:
            _need("--deepspeed", "deepspeed", "deepspeed")
        if self.use_liger_kernel:
            _need("--use_liger_kernel", "liger_kernel", "liger")
        defaults = {f.name: f.default for f in fields(self)}
        for name, why in _NOT_FOR_GKD.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"--{name} does not apply to GKD: {why}.")
        if not torch.accelerator.is_available():  # a machine with no accelerator runs on its CPU without being told
            self.use_cpu = True
            self.bf16 = bool(self.bf16)  # TRL's default is bf16, which is slower than fp32 on most CPUs
        with warnings.catch_warnings():
            # TRL 1.16 sets the old name by itself, so nobody who reads the warning could act on it.
            warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
            super().__post_init__()
        self.check_placement()
        if self.torch_compile:  # gkd.models.compile_layers does it; accelerate would wrap the whole model
            for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
                os.environ.pop(name, None)

    @property
    def generates(self) -> bool:
        """Whether these flags, without an --eval_dataset_name, have a model write text."""
        evaluates = self.eval_on_start or self.eval_strategy != "no"
        return self.lmbda > 0 or (self.seq_kd and self.teacher_cache is None) or evaluates

    def _check_ranges(self) -> None:
        """Raises ValueError for a number that no run can do anything with."""
        for name in ("lmbda", "beta", "kd_ratio"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"--{name} must lie in [0, 1], not {getattr(self, name)}.")
        check_positive(self, _POSITIVE)
        for name in ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "neftune_noise_alpha"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ValueError(f"--{name} must be a number from 0 on, not {getattr(self, name)}.")
        check_seed(self, "seed", "data_seed")
        if self.max_steps == 0:
            raise ValueError(
                "--max_steps 0 trains nothing: give the number of steps, or leave it out for whole epochs."
            )
        if self.max_steps < 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(
                f"--num_train_epochs {self.num_train_epochs} trains nothing that ends: give a positive number, or --max_steps."
            )
        if self.activation_offloading and not torch.accelerator.is_available():
            raise ValueError("--activation_offloading moves activations from a GPU to the CPU: there is no GPU.")
        if self.save_strategy == "best" and (self.metric_for_best_model is None or self.eval_strategy == "no"):
            raise ValueError("--save_strategy best needs --metric_for_best_model and --eval_strategy steps or epoch.")

    # Three ways out of the process: training_args.bin in each checkpoint, the trackers, and whoever prints the arguments.

    def __getstate__(self) -> dict[str, Any]:
        return {name: None if is_secret(name) else public(value) for name, value in vars(self).items()}

    def to_dict(self) -> dict[str, Any]:
        return public(super().to_dict())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_dict()})"

    __str__ = __repr__


# What `--help` shows, by group; `--help_all` shows the rest too.
_HELP_GROUPS = {
    "data": "dataset_name dataset_config dataset_train_split dataset_test_split train_on chat_template_kwargs "
    "system_as_user max_length preflight",
    "student": "model_name_or_path dtype attn_implementation use_peft lora_r lora_alpha lora_dropout "
    "lora_target_modules load_in_4bit load_in_8bit student_adapter trust_remote_code",
    "teacher": "teacher_model_name_or_path teacher_dtype teacher_cuda_graph teacher_revision teacher_adapter teacher_load_in_4bit "
    "teacher_load_in_8bit teacher_trust_remote_code teacher_device teacher_offload teacher_sharded teacher_cache",
    "distillation": "lmbda beta seq_kd kd_ratio loss_temperature disable_dropout",
    "generation": "temperature max_new_tokens generation_batch_size generation_backend steps_per_generation "
    "teacher_text_cache",
    "training": "output_dir learning_rate num_train_epochs max_steps per_device_train_batch_size "
    "gradient_accumulation_steps gradient_checkpointing bf16 warmup_steps lr_scheduler_type seed auto_micro_batch "
    "max_skipped_steps",
    "log, save": "logging_steps report_to log_completions save_strategy save_steps save_total_limit "
    "resume_from_checkpoint",
    "evaluate": "eval_dataset_name eval_strategy eval_steps metrics scorer eval_temperature load_best_model_at_end "
    "metric_for_best_model",
}
_GROUP_OF = {name: group for group, names in _HELP_GROUPS.items() for name in names.split()}


class FlagParser(CommandParser, TrlParser):
    """A command's flags from dataclasses: each is shown once, by one spelling; a bare flag of a switch means yes.

    All errors of the command line leave through `argparse.ArgumentParser.error`: one line, exit code 2.
    """

    def _group(self, name: str) -> Any:
        """The group of a flag: none here."""
        return self

    def _add_dataclass_arguments(self, dtype):
        # TrlParser's own method puts a whole dataclass into one group; its one-field helper takes any group.
        hints = get_type_hints(dtype)
        for item in fields(dtype):
            if not item.init:
                continue
            item.type = hints[item.name]
            before = len(self._actions)
            self._parse_dataclass_field(self._group(item.name), item)
            for action in self._actions[before:]:
                self._tidy(action, hints[item.name])

    def _tidy(self, action: Action, hint: Any) -> None:
        kinds = {get_origin(kind) or kind for kind in (hint, *get_args(hint))}
        action.may_be_none = type(None) in kinds or action.default is None
        action.takes_many = action.nargs in ("*", "+") or bool(kinds & {dict, list})
        if action.const is False:  # --no_x, which is understood, but stands beside --x
            action.help = SUPPRESS
        elif hint in (bool, bool | None):
            action.nargs, action.const = "?", True  # TRL's parser wants a value after --bf16; people type none
            action.metavar = "True|False"
        elif not action.choices:
            text = "PATH" if action.dest in PATHS else "VALUE"
            names = {dict: "JSON", int: "N", float: "X"}
            action.metavar = next((names[kind] for kind in names if kind in kinds), text)
        # The spelling --with-dashes is understood too.
        action.option_strings = [s for s in action.option_strings if "-" not in s[2:]] or action.option_strings

    def parse_one(self, argv: list[str] | None = None) -> Any:
        """The dataclass of a command that has one; exits with code 2 and one line for a bad value."""
        try:
            return self.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]
        except (ValueError, OSError, ImportError) as error:
            self.error(str(error))


class GKDParser(FlagParser):
    """The flags of train_gkd.py: grouped help, deprecated names with a line for each, and `--config`."""

    also_known = [f"--{flag}" for name in DEPRECATED_FLAGS for flag in {name, name.replace("_", "-")}]

    def __init__(self, **kwargs):
        self._groups: dict[str, Any] = {}
        kwargs.setdefault("prog", "train_gkd.py")
        super().__init__((DataArguments, StudentArguments, GKDArguments), **kwargs)
        self.add_argument("--config", metavar="FILE.yaml", help="YAML file of flags; the command line overrides it.")
        self.add_argument(
            "--help_all", action=ShowAll, help="Show every flag, those of transformers and TRL included."
        )

    def _group(self, name: str) -> Any:
        if not self._groups:
            self._groups = {title: self.add_argument_group(title) for title in [*_HELP_GROUPS, "all other flags"]}
        return self._groups[_GROUP_OF.get(name, "all other flags")]

    def _tidy(self, action: Action, hint: Any) -> None:
        super()._tidy(action, hint)
        action.hidden = action.dest not in _GROUP_OF

    def parse(self, argv: list[str] | None = None) -> tuple[DataArguments, StudentArguments, GKDArguments]:
        """Parses flags and `--config` into the three dataclasses.

        Exits with code 2 and one line for an unknown flag (with the nearest name), a bad value or an unreadable file.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        self.check_words(argv)
        argv = _replace_deprecated(argv)
        actions = (self._option_string_actions.get(word.split("=")[0]) for word in argv)
        self.given = {action.dest for action in actions if action is not None}  # by name; --config adds its own
        try:
            self._load_config(argv)
            *parsed, _, unknown = self.parse_args_into_dataclasses(
                argv, return_remaining_strings=True, look_for_args_file=False
            )
            if unknown:
                self.error(f"not understood: {' '.join(unknown)}")
        except (ValueError, OSError, ImportError) as error:
            self.error(str(error))
        return tuple(parsed)

    def _load_config(self, argv: list[str]) -> None:
        words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        path = next((b for a, b in itertools.pairwise(words) if a == "--config"), None)
        if path is None:
            return
        path = expand_user(path)
        known = self._option_string_actions
        try:
            config = yaml.safe_load(read_text(path))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {one_line(error)}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} must be a YAML mapping of flag names to values.")
        for old, (new, message) in DEPRECATED_FLAGS.items():
            if old in config:
                print(f"warning: {path}: {message}", file=sys.stderr)
                value = config.pop(old)
                if new is not None:
                    config.setdefault(new, value)
        for name in config:
            if f"--{name}" not in known:
                raise ValueError(f"{path}: {unknown_flag(str(name), known)}")
            _check_kind(path, name, config[name], known[f"--{name}"])
            choices = known[f"--{name}"].choices
            if isinstance(config[name], bool) and choices and config[name] not in choices:
                words = ("on", "yes") if config[name] else ("off", "no")  # YAML reads these words as booleans
                config[name] = next((word for word in words if word in choices), config[name])
            if choices and config[name] not in (*choices, None):
                raise ValueError(
                    f"{path}: {name} must be one of {', '.join(map(str, choices))}, not {config[name]!r}."
                )
        self.given |= config.keys()
        self.set_defaults_with_config(**config)


def _check_kind(path: str, name: str, value: Any, action: Action) -> None:
    """Raises ValueError for a value in YAML that no command line can give this flag."""
    if value is None and not getattr(action, "may_be_none", True):
        raise ValueError(f"{path}: {name} has no value: give it one, or leave it out.")
    if isinstance(value, list | dict) and not getattr(action, "takes_many", False):
        raise ValueError(f"{path}: {name} takes a single value, not {value!r:.60}.")


def _replace_deprecated(argv: list[str]) -> list[str]:
    """Replaces or drops each deprecated flag, with one line on stderr that says what to use."""
    result: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        key = name.removeprefix("--").replace("-", "_") if name.startswith("--") else None
        if key not in DEPRECATED_FLAGS:
            result.append(word)
            continue
        new, message = DEPRECATED_FLAGS[key]
        print(f"warning: {message}", file=sys.stderr)
        if not equals:
            value = next(words, "")
        if new is not None:
            result += [f"--{new}", value]
    return result
