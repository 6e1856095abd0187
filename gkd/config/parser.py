"""The parsers of the commands whose flags are dataclasses, and of `gkd train` with its groups and `--config`."""

import itertools
import sys
from argparse import SUPPRESS, Action
from copy import copy
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from gkd.config.command_line import CommandParser, unknown_flag
from gkd.config.generation import GenerationArguments
from gkd.config.teacher import PlacementArguments, TextArguments
from gkd.config.training import DataArguments, GKDArguments, StudentArguments
from gkd.io.errors import one_line
from gkd.io.paths import PATHS, expand_user, read_text
from gkd.metrics.divergences import DIVERGENCE_FLAGS

# Flags that libraries have dropped and old commands still use: the flag that replaces each, and the warning.
DEPRECATED_FLAGS = {
    "torch_dtype": ("dtype", "--torch_dtype is deprecated: use --dtype."),
    "dataset_batch_size": (None, "--dataset_batch_size is deprecated and ignored: rows are tokenized one by one."),
    "max_seq_length": ("max_length", "--max_seq_length is deprecated: use --max_length."),
    "evaluation_strategy": ("eval_strategy", "--evaluation_strategy is deprecated: use --eval_strategy."),
}


def _names(kind: type) -> str:
    """Of a dataclass's flags that `--help` shows."""
    return " ".join(item.name for item in fields(kind) if item.init and item.name != "teacher_model_init_kwargs")


# What `--help` shows, by group; `--help_all` shows the rest too.
_HELP_GROUPS = {
    "data": "dataset_name dataset_config dataset_train_split dataset_test_split train_on chat_template_kwargs "
    "system_as_user max_length preflight",
    "student": "model_name_or_path dtype attn_implementation use_peft lora_r lora_alpha lora_dropout "
    "lora_target_modules load_in_4bit load_in_8bit student_adapter trust_remote_code",
    "teacher": f"{_names(PlacementArguments)} teacher_cache {_names(TextArguments)}",
    "distillation": f"lmbda lmbda_schedule lmbda_steps lmbda_probe_steps {' '.join(DIVERGENCE_FLAGS)} seq_kd kd_ratio "
    "loss_temperature disable_dropout rollout_guard",
    "generation": f"temperature max_new_tokens generation_batch_size {_names(GenerationArguments)} steps_per_generation "
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
    """A command's flags from dataclasses, each with one spelling in the help. A switch without a value means yes."""

    def _group(self, name: str) -> Any:
        """The help group of a flag; here the parser itself."""
        return self

    def _add_dataclass_arguments(self, dtype):
        # TrlParser's method puts a whole dataclass into one group; its helper for a single field takes any group.
        hints = get_type_hints(dtype)
        for item in sorted(fields(dtype), key=lambda item: item.name.startswith("teacher_")):  # the teacher's last
            if not item.init:
                continue
            item = copy(item)
            item.type = hints[item.name]
            parse = item.metadata.get("parse")
            # TRL's helper passes the metadata to argparse, which does not accept these.
            item.metadata = {key: value for key, value in item.metadata.items() if key not in ("within", "parse")}
            before = len(self._actions)
            self._parse_dataclass_field(self._group(item.name), item)
            for action in self._actions[before:]:
                action.type = parse or action.type
                self._tidy(action, hints[item.name])

    def _tidy(self, action: Action, hint: Any) -> None:
        kinds = {get_origin(kind) or kind for kind in (hint, *get_args(hint))}
        action.may_be_none = type(None) in kinds or action.default is None
        action.takes_many = action.nargs in ("*", "+") or bool(kinds & {dict, list})
        if action.const is False:  # --no_x is accepted, and not shown beside --x
            action.help = SUPPRESS
        elif hint in (bool, bool | None):
            action.nargs, action.const = "?", True  # TRL's parser demands a value after --bf16
            action.metavar = "True|False"
        elif not action.choices:
            text = "PATH" if action.dest in PATHS else "VALUE"
            names = {dict: "JSON", int: "N", float: "X"}
            action.metavar = next((names[kind] for kind in names if kind in kinds), text)
        # The spelling --with-dashes is accepted too, and not shown.
        action.option_strings = [s for s in action.option_strings if "-" not in s[2:]] or action.option_strings

    def parse_one(self, argv: list[str] | None = None, first: tuple[str, ...] = ()) -> Any:
        """Parses the flags of a command with a single dataclass; exits with code 2 and one line for a bad value.

        `first`: flags whose values may stand first, in this order, without their names.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        bare = len(list(itertools.takewhile(lambda word: not word.startswith("-"), argv[: len(first)])))
        argv = [word for pair in zip(first, argv[:bare], strict=False) for word in pair] + argv[bare:]
        with self.refusals():
            return self.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]


class GKDParser(FlagParser):
    """The flags of `gkd train`: grouped help, deprecated names with a warning for each, and `--config`."""

    also_known = [f"--{flag}" for name in DEPRECATED_FLAGS for flag in {name, name.replace("_", "-")}]

    def __init__(self, **kwargs):
        self._groups: dict[str, Any] = {}
        kwargs.setdefault("prog", "train_gkd.py")
        super().__init__((DataArguments, StudentArguments, GKDArguments), **kwargs)
        self.add_argument("--config", metavar="FILE.yaml", help="YAML file of flags; the command line overrides it.")
        self.add_argument("--help_all", action="help", help="Show every flag, those of transformers and TRL included.")

    def _group(self, name: str) -> Any:
        if not self._groups:
            self._groups = {title: self.add_argument_group(title) for title in [*_HELP_GROUPS, "all other flags"]}
        return self._groups[_GROUP_OF.get(name, "all other flags")]

    def _tidy(self, action: Action, hint: Any) -> None:
        super()._tidy(action, hint)
        action.hidden = action.dest not in _GROUP_OF

    def parse(self, argv: list[str] | None = None) -> tuple[DataArguments, StudentArguments, GKDArguments]:
        """Parses flags and `--config`; exits with code 2 and one line for an unknown flag, a bad value or file."""
        argv = list(sys.argv[1:] if argv is None else argv)
        self.check_words(argv)
        argv = _replace_deprecated(argv)
        actions = (self._option_string_actions.get(word.split("=")[0]) for word in argv)
        self.given = {action.dest for action in actions if action is not None}  # --config adds to these
        with self.refusals():
            self._load_config(argv)
            *parsed, _, unknown = self.parse_args_into_dataclasses(
                argv, return_remaining_strings=True, look_for_args_file=False
            )
            if unknown:
                self.error(f"not understood: {' '.join(unknown)}")
            parsed[-1].check_divergence(self.given)
        return tuple(parsed)

    def _load_config(self, argv: list[str]) -> None:
        """Makes the values in the file of --config the defaults. Raises ValueError for a bad file."""
        words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        path = next((b for a, b in itertools.pairwise(words) if a == "--config"), None)
        if not path:
            return
        path = expand_user(path)
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
        for name, value in config.items():
            action = self._option_string_actions.get(f"--{name}")
            if action is None:
                raise ValueError(f"{path}: {unknown_flag(str(name), self._option_string_actions)}")
            if value is None and not getattr(action, "may_be_none", True):
                raise ValueError(f"{path}: {name} has no value: give it one, or leave it out.")
            if isinstance(value, list | dict) and not getattr(action, "takes_many", False):
                raise ValueError(f"{path}: {name} takes a single value, not {value!r:.60}.")
            choices = action.choices or (value,)
            if isinstance(value, bool) and value not in choices:
                words = ("on", "yes") if value else ("off", "no")  # YAML reads these words as booleans
                config[name] = value = next((word for word in words if word in choices), value)
            if value not in (*choices, None):
                raise ValueError(f"{path}: {name} must be one of {', '.join(map(str, choices))}, not {value!r}.")
        self.given |= config.keys()
        self.set_defaults_with_config(**config)


def _replace_deprecated(argv: list[str]) -> list[str]:
    """Replaces or drops each deprecated flag, with a warning on stderr."""
    result: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        key = name[2:].replace("-", "_")
        if not name.startswith("--") or key not in DEPRECATED_FLAGS:
            result.append(word)
            continue
        new, message = DEPRECATED_FLAGS[key]
        print(f"warning: {message}", file=sys.stderr)
        value = value if equals else next(words, "")
        result += [f"--{new}", value] if new else []
    return result
