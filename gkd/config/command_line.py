"""A parser with short usage, the nearest name for a misspelt flag, clean help, and `~` in paths. Imports no library."""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gkd.io.paths import PATHS, check_output, expand_user
from gkd.io.terminal import visible

# Of each command with cached flags: what stands behind its name in a usage line, and what makes its parser.
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
    """Leaves out what `--help_all` alone shows, and tells a default that says something, once."""

    show_all = False

    def add_argument(self, action: argparse.Action) -> None:
        if self.show_all or not getattr(action, "hidden", False):
            super().add_argument(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        told = "default" in text.lower() or f"({default})" in text
        if told or default in (None, False, "", argparse.SUPPRESS) or isinstance(default, (list, dict)):
            return text
        return f"{text} (default: %(default)s)".lstrip()


class CommandParser(argparse.ArgumentParser):
    """Short usage where nothing is given, the nearest name for a misspelt flag, clean help, `~` in paths.

    Errors are one line, and exit with code 2. An action may be `hidden`: `--help_all` alone shows it.
    """

    also_known: Iterable[str] = ()  # flags that are understood but are no actions
    launcher: dict[str, int] = {}  # flags that accelerate's launcher understands, with how many words each takes
    launched = False  # `--accelerate_config` was given
    show_all = False

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", Help)
        # Or argparse would take --lmbd for --lmbda, and tomorrow for something else.
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
        """What accelerate's launcher is to get and what the command; a flag that both have is the command's."""
        known = {*self._option_string_actions, *self.also_known}
        launch, own = [], []
        left = iter(words)
        for word in left:
            name, equals, _ = word.partition("=")
            if name in known or name not in self.launcher:
                own.append(word)
                continue
            launch.append(word)
            if self.launcher[name] and not equals:
                launch += [value for value in [next(left, None)] if value is not None]
        return launch, own

    def check_launch(self, words: list[str]) -> list[str]:
        """Checks what is said to accelerate's launcher, as far as no import is needed, and gives the other words back.

        Exits with code 2 for a configuration that is not there, or a launcher's flag without one.
        """
        name, words = self.take_launch_flag(words)
        launch, own = self.split_words(words)
        if name is not None:
            try:
                config_file(name)
            except ValueError as error:
                self.error(str(error))
            self.launched = True
            return own
        if launch and LAUNCH in self._option_string_actions:
            self.error(f"{launch[0].partition('=')[0]} is of accelerate's launcher: give {LAUNCH} too.")
        return words

    def check_words(self, words: list[str]) -> None:
        """Exits with code 2 where nothing is given, or a word is no flag of this command."""
        if not words and (self.prog in COMMANDS or any(action.required for action in self._actions)):
            self.exit(2, self.format_brief())
        known = {*self._option_string_actions, *self.also_known, *(self.launcher if self.launched else ())}
        for word in words:
            name, _, _ = word.partition("=")
            if word == "--":  # what follows is no flag
                break
            # One dash, as the flags of torchrun have: -learning_rate.
            is_flag = word.startswith("--") or re.match("-[a-z]{2}", word)
            if is_flag and " " not in name and name not in known:
                self.error(unknown_flag(name, known))
        self._refuse_empty_paths(words)
        usage = COMMANDS.get(self.prog, ("",))[0]
        if words and not words[0].startswith("-") and usage.startswith("--"):  # a command that takes flags alone
            self.error(f"not understood: {words[0]}. Flags begin with --; see --help.")

    def _refuse_empty_paths(self, words: list[str]) -> None:
        """Before types see them: pathlib takes an empty path for the working folder."""
        places = [action for action in self._actions if not action.option_strings]
        flag = None  # whose values the next words are
        for word in words:
            name, equals, value = word.partition("=")
            if name in self._option_string_actions:
                action = self._option_string_actions[name]
                flag = None if equals or action.nargs == 0 else action
                empty = bool(equals) and not value
            else:
                action = flag or next(iter(places), None)
                flag = None if flag is None or flag.nargs in (None, "?") else flag
                empty = not word
            if empty and action is not None and action.dest in PATHS:
                called = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
                self.error(f"{called}: an empty name; give a file or a folder.")

    def _get_formatter(self) -> argparse.HelpFormatter:
        formatter = super()._get_formatter()
        formatter.show_all = self.show_all
        return formatter

    def format_brief(self) -> str:
        """What is required, an example, and how to get help."""
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


def unknown_flag(name: str, known: Iterable[str]) -> str:
    """The message for a flag that a command does not have, with the nearest of those that it has."""
    names = {option.lstrip("-").replace("-", "_"): option for option in sorted(known) if option.startswith("--")}
    typed, name = name if name.startswith("-") else f"--{name}", name.lstrip("-")
    near = difflib.get_close_matches(name.replace("-", "_"), names, n=1)
    every = "--help_all" if "help_all" in names else "--help"
    return f"unknown flag {typed}." + (f" Did you mean {names[near[0]]}?" if near else f" See {every} for every flag.")


def config_folder() -> Path:
    """Where our configurations of accelerate are: beside the modules of an installed package, above them in a checkout."""
    package = Path(__file__).parent.parent
    folders = [package / "ds_configs", package.parent / "ds_configs"]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def config_file(name: str) -> Path:
    """The configuration of accelerate that `--accelerate_config` names: one of ours, or a file.

    Raises:
        ValueError: there is none of that name.
    """
    ours = {path.stem: path for path in sorted(config_folder().glob("*.yaml"))}
    if name in ours:
        return ours[name]
    path = Path(expand_user(name))
    if path.is_file():
        return path
    near = difflib.get_close_matches(name, ours, n=1)
    hint = f"Did you mean {near[0]}?" if near else "Give a file."
    raise ValueError(f"{LAUNCH} {name}: no such file, and none of ours, which are {', '.join(ours)}. {hint}")
