"""This process's command as it was typed, and variants of it: to resume the run, or to start another."""

import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Collection
from itertools import chain
from pathlib import Path

import psutil

from gkd.io.secrets import without_secrets

# Environment variable in which gkd.cli.launch passes its sys.argv, as JSON, to the processes that it starts.
LAUNCHED_BY = "GKD_LAUNCHED_BY"


def start_of(script: str) -> list[str]:
    """The words that start the program whose `sys.argv[0]` is `script`."""
    path = Path(script)
    if path.name == "__main__.py":
        return [sys.executable, "-m", path.parent.name]
    if path.suffix == ".py":
        return [sys.executable, script]
    return [path.name if shutil.which(path.name) == str(path) else script]


def typed_command() -> list[str]:
    """The words of the command as it was typed, its launcher included, without --resume_from_checkpoint."""
    script, *flags = json.loads(os.environ.get(LAUNCHED_BY, "null")) or sys.argv
    words = [*start_of(script), *flags]
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process().parent()
        typed = parent.cmdline() if parent is not None else []
        called = words[-1 - len(flags) :]
        if LAUNCHED_BY not in os.environ and typed[-len(called) :] == called:
            words = typed
    return without_secrets(_without(words, ["--resume_from_checkpoint"]))


def _without(words: list[str], flags: Collection[str]) -> list[str]:
    """The words without these flags and their values."""
    kept: list[str] = []
    may_be_value = False
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag not in flags and (word.startswith("--") or not may_be_value):
            kept.append(word)
        may_be_value = flag in flags and not equals
    return kept


def resume_command() -> str:
    """The command as it was typed, with the flag that resumes this run."""
    return shlex.join([*typed_command(), "--resume_from_checkpoint", "auto"])


def retyped(new: dict[str, str]) -> str:
    """The command as it was typed, with these flags set to new values."""
    flags = {f"--{flag}": value for flag, value in new.items()}
    return shlex.join([*_without(typed_command(), flags), *chain.from_iterable(flags.items())])
