"""The parser of all commands: short usage, the nearest name for a misspelt flag, `~` in paths. Imports no library."""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from gkd.io.paths import PATHS, check_output, expand_user
from gkd.io.terminal import visible

# For each command with cached flags: its usage line behind the name, and the function that builds its parser.
_MODELS_AND_DATA = "--model_name_or_path STUDENT --teacher_model_name_or_path TEACHER --dataset_name DATA --output_dir"
COMMANDS = {
    "train_gkd.py": (f"{_MODELS_AND_DATA} OUT [flags]", "gkd.config.parser:GKDParser"),
    "eval_gkd.py": ("RUN [flags]", "gkd.config.evaluation:make_parser"),
    "cache_teacher.py": (f"{_MODELS_AND_DATA} CACHE [flags]", "gkd.config.caching:make_parser"),
}
LAUNCHED = ("gkd train", "gkd evaluate", "gkd cache")  # take `--accelerate_config`
COMMANDS |= dict(zip(LAUNCHED, COMMANDS.values(), strict=True))
COMMANDS["gkd serve"] = ("TEACHER [flags]", "gkd.config.serving:make_parser")
COMMANDS["gkd diagnose"] = ("STUDENT TEACHER ROWS [flags]", "gkd.config.diagnosing:make_parser")

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
        self.show_all = "--help_all" in words
        namespace, rest = super().parse_known_args(words, namespace)
        for name in PATHS & vars(namespace).keys():
            setattr(namespace, name, expand_user(getattr(namespace, name)))
        with self.refusals():
            for name in ("output_dir", "teacher_text_cache"):
                check_output(f"--{name}", getattr(namespace, name, None))
        return namespace, rest

    def _get_values(self, action: argparse.Action, words: list[str]) -> Any:
        if action.dest in PATHS and "" in words:  # pathlib would take it for the working folder
            name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
            self.error(f"{name}: an empty name; give a file or a folder.")
        return super()._get_values(action, words)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Exits with code 2 and one line where a value is refused."""
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            self.error(str(error))

    def split_words(self, words: list[str]) -> tuple[str | None, list[str], list[str]]:
        """The value of `--accelerate_config`, if given; the words for accelerate's launcher; the command's words.

        The command gets the flags that both have.
        """
        own = {*self._option_string_actions, *self.also_known}
        config, launch, command = None, [], []
        left = iter(words)
        for word in left:
            name, equals, value = word.partition("=")
            if name == LAUNCH and LAUNCH in own:
                config = value if equals else next(left, "")
            elif name in own or name not in self.launcher:
                command.append(word)
            else:
                launch += [word, *islice(left, 0 if equals else self.launcher[name])]
        return config, launch, command

    def check_launch(self, words: list[str]) -> list[str]:
        """Checks the words for accelerate's launcher as far as that needs no import, and returns the other words.

        Exits with code 2 for a missing configuration, or for a launcher's flag without --accelerate_config.
        """
        name, launch, command = self.split_words(words)
        if name is None:
            if launch and LAUNCH in self._option_string_actions:
                self.error(f"{launch[0].partition('=')[0]} is of accelerate's launcher: give {LAUNCH} too.")
            return words
        with self.refusals():
            config_file(name)
        self.launched = True
        return command

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
        usage = COMMANDS.get(self.prog, ("",))[0]
        if words and not words[0].startswith("-") and usage.startswith("--"):  # a command that takes flags alone
            self.error(f"not understood: {words[0]}. Flags begin with --; see --help.")

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


def unknown_flag(name: str, flags: Iterable[str]) -> str:
    """The message for a flag that is none of `flags`, with the nearest of them."""
    names = {option.lstrip("-").replace("-", "_"): option for option in sorted(flags) if option.startswith("--")}
    typed, name = name if name.startswith("-") else f"--{name}", name.lstrip("-")
    near = difflib.get_close_matches(name.replace("-", "_"), names, n=1)
    every = "--help_all" if "help_all" in names else "--help"
    return f"unknown flag {typed}." + (f" Did you mean {names[near[0]]}?" if near else f" See {every} for every flag.")


def config_file(name: str) -> Path:
    """The file that `--accelerate_config` names: one of ours, or a path. Raises ValueError if there is none."""
    package = Path(__file__).parent.parent
    folders = (package / "ds_configs", package.parent / "ds_configs")  # of an installed package, of a checkout
    folder = next(filter(Path.is_dir, folders), folders[0])
    ours = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name in ours:
        return ours[name]
    path = Path(expand_user(name))
    if path.is_file():
        return path
    near = difflib.get_close_matches(name, ours, n=1)
    hint = f"Did you mean {near[0]}?" if near else "Give a file."
    raise ValueError(f"{LAUNCH} {name}: no such file, and none of ours, which are {', '.join(ours)}. {hint}")
