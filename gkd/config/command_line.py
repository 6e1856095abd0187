"""The parser of all commands: short usage, the nearest name for a misspelt flag, `~` in paths. Imports no library."""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gkd.io.paths import PATHS, check_output, expand_user
from gkd.io.terminal import visible

# For each command with cached flags: its usage line behind the name, and the function that builds its parser.
COMMANDS = {
    "train_gkd.py": (
        "--model_name_or_path STUDENT --teacher_model_name_or_path TEACHER --dataset_name DATA --output_dir OUT [flags]",
        "gkd.config.parser:GKDParser",
    ),
    "eval_gkd.py": ("RUN [flags]", "gkd.config.evaluation:make_parser"),
    "cache_teacher.py": (
        "--model_name_or_path STUDENT --teacher_model_name_or_path TEACHER --dataset_name DATA --output_dir CACHE [flags]",
        "gkd.config.caching:make_parser",
    ),
}
COMMANDS |= {
    "gkd train": COMMANDS["train_gkd.py"],
    "gkd evaluate": COMMANDS["eval_gkd.py"],
    "gkd cache": COMMANDS["cache_teacher.py"],
}

LAUNCH = "--accelerate_config"


class Help(argparse.RawDescriptionHelpFormatter):
    """Hides flags that only `--help_all` shows, and adds a default to a help text that does not name it yet."""

    show_all = False

    def add_argument(self, action: argparse.Action) -> None:
        if self.show_all or not getattr(action, "hidden", False):
            super().add_argument(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        named = "default" in text.lower() or f"({default})" in text
        if named or default in (None, False, "", argparse.SUPPRESS) or isinstance(default, (list, dict)):
            return text
        return f"{text} (default: %(default)s)".lstrip()


class CommandParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line and exit with code 2.

    An action may have the attribute `hidden`: only `--help_all` shows it.
    """

    also_known: Iterable[str] = ()  # flags that are accepted but have no action
    launcher: dict[str, int] = {}  # flags of accelerate's launcher, and how many values each takes: 0 or 1
    launched = False  # `--accelerate_config` was given
    show_all = False

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", Help)
        # argparse would take --lmbd for --lmbda, and after a new flag for something else.
        kwargs.setdefault("allow_abbrev", False)
        if kwargs.get("prog") in COMMANDS:
            kwargs.setdefault("usage", f"%(prog)s {COMMANDS[kwargs['prog']][0]}")
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        self.check_words(words)
        namespace, rest = super().parse_known_args(words, namespace)
        for name in PATHS & vars(namespace).keys():
            setattr(namespace, name, expand_user(getattr(namespace, name)))
        try:
            for name in ("output_dir", "teacher_text_cache"):
                check_output(f"--{name}", getattr(namespace, name, None))
        except ValueError as error:
            self.error(str(error))
        return namespace, rest

    def take_launch_flag(self, words: list[str]) -> tuple[str | None, list[str]]:
        """The value of `--accelerate_config`, None where it is not given, and the other words."""
        name, rest = None, []
        left = iter(words)
        for word in left:
            flag, equals, value = word.partition("=")
            if flag == LAUNCH and LAUNCH in self._option_string_actions:
                name = value if equals else next(left, "")
            else:
                rest.append(word)
        return name, rest

    def split_words(self, words: list[str]) -> tuple[list[str], list[str]]:
        """The words for accelerate's launcher and those for the command, which gets the flags that both have."""
        command_flags = {*self._option_string_actions, *self.also_known}
        launch, command = [], []
        left = iter(words)
        for word in left:
            name, equals, _ = word.partition("=")
            if name in command_flags or name not in self.launcher:
                command.append(word)
                continue
            launch.append(word)
            if self.launcher[name] and not equals:
                launch += [value for value in [next(left, None)] if value is not None]
        return launch, command

    def check_launch(self, words: list[str]) -> list[str]:
        """Checks the words for accelerate's launcher as far as that needs no import, and returns the other words.

        Exits with code 2 for a missing configuration, or for a launcher's flag without --accelerate_config.
        """
        name, words = self.take_launch_flag(words)
        launch, command = self.split_words(words)
        if name is not None:
            try:
                config_file(name)
            except ValueError as error:
                self.error(str(error))
            self.launched = True
            return command
        if launch and LAUNCH in self._option_string_actions:
            self.error(f"{launch[0].partition('=')[0]} is of accelerate's launcher: give {LAUNCH} too.")
        return words

    def check_words(self, words: list[str]) -> None:
        """Exits with code 2 if there are no words, or one of them is no flag of this command."""
        if not words and (self.prog in COMMANDS or any(action.required for action in self._actions)):
            self.exit(2, self.format_brief())
        flags = {*self._option_string_actions, *self.also_known, *(self.launcher if self.launched else ())}
        for word in words:
            name, _, _ = word.partition("=")
            if word == "--":  # the rest are no flags
                break
            # With one dash too, as torchrun's flags are written: -learning_rate.
            is_flag = word.startswith("--") or re.match("-[a-z]{2}", word)
            if is_flag and " " not in name and name not in flags:
                self.error(unknown_flag(name, flags))
        self._refuse_empty_paths(words)
        usage = COMMANDS.get(self.prog, ("",))[0]
        if words and not words[0].startswith("-") and usage.startswith("--"):  # a command that takes flags alone
            self.error(f"not understood: {words[0]}. Flags begin with --; see --help.")

    def _refuse_empty_paths(self, words: list[str]) -> None:
        """Exits with code 2 for an empty path, which pathlib would take for the working folder."""
        positionals = [action for action in self._actions if not action.option_strings]
        flag = None  # the flag that the next words are values of
        for word in words:
            name, equals, value = word.partition("=")
            if name in self._option_string_actions:
                action = self._option_string_actions[name]
                flag = None if equals or action.nargs == 0 else action
                empty = bool(equals) and not value
            else:
                action = flag or next(iter(positionals), None)
                flag = None if flag is None or flag.nargs in (None, "?") else flag
                empty = not word
            if empty and action is not None and action.dest in PATHS:
                name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
                self.error(f"{name}: an empty name; give a file or a folder.")

    def _get_formatter(self) -> argparse.HelpFormatter:
        formatter = super()._get_formatter()
        formatter.show_all = self.show_all
        return formatter

    def format_brief(self) -> str:
        """The usage, the first paragraph of the description, an example, and how to get help."""
        description = (self.description or "").strip()
        example = re.search(r"^ *((?:python|gkd) (?:.*\\\n)*.*)$", description, re.M)
        parts = [self.format_usage().strip(), description.split("\n\n")[0]]
        if example:
            parts.append("For example:\n\n    " + re.sub(r"\n\s*", "\n        ", example[1]))
        parts.append("--help shows the flags.")
        return "\n\n".join(filter(None, parts)) + "\n"

    def _print_message(self, message: str, file: Any = None) -> None:
        encoding = getattr(file or sys.stderr, "encoding", None) or "utf-8"
        super()._print_message(message.encode(encoding, "replace").decode(encoding), file)  # λ, on a cp1252 terminal

    def error(self, message: str):
        self.exit(2, visible(f"{self.prog}: error: {message}\n"))


class ShowAll(argparse.Action):
    """`--help_all`: every flag, those of transformers and TRL included."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        parser.show_all = True
        parser.print_help()
        parser.exit()


def unknown_flag(name: str, flags: Iterable[str]) -> str:
    """The message for a flag that is none of `flags`, with the nearest of them."""
    names = {option.lstrip("-").replace("-", "_"): option for option in sorted(flags) if option.startswith("--")}
    typed, name = name if name.startswith("-") else f"--{name}", name.lstrip("-")
    near = difflib.get_close_matches(name.replace("-", "_"), names, n=1)
    every = "--help_all" if "help_all" in names else "--help"
    return f"unknown flag {typed}." + (f" Did you mean {names[near[0]]}?" if near else f" See {every} for every flag.")


def config_folder() -> Path:
    """The folder of our accelerate configurations: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent.parent
    folders = [package / "ds_configs", package.parent / "ds_configs"]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def config_file(name: str) -> Path:
    """The file that `--accelerate_config` names: one of ours, or a path. Raises ValueError if there is none."""
    ours = {path.stem: path for path in sorted(config_folder().glob("*.yaml"))}
    if name in ours:
        return ours[name]
    path = Path(expand_user(name))
    if path.is_file():
        return path
    near = difflib.get_close_matches(name, ours, n=1)
    hint = f"Did you mean {near[0]}?" if near else "Give a file."
    raise ValueError(f"{LAUNCH} {name}: no such file, and none of ours, which are {', '.join(ours)}. {hint}")
