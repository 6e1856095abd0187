"""This process's command as it was typed, and variants of it: to resume the run, or to start another."""

import contextlib
import json
import os
import shlex
import shutil
import sys
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
        called = [start_of(script)[-1], *flags]
        if LAUNCHED_BY not in os.environ and typed[-len(called) :] == called:
            words = typed
    kept: list[str] = []
    for word in words:
        if kept and kept[-1] == "--resume_from_checkpoint" and not word.startswith("--"):
            kept.pop()
        elif not word.startswith("--resume_from_checkpoint="):
            kept.append(word)
    kept = [word for word in kept if word != "--resume_from_checkpoint"]
    return without_secrets(kept)


def resume_command() -> str:
    """The command as it was typed, with the flag that resumes this run."""
    return shlex.join([*typed_command(), "--resume_from_checkpoint", "auto"])


def retyped(new: dict[str, str]) -> str:
    """The command as it was typed, with these flags set to new values."""
    words: list[str] = []
    for word in typed_command():
        if words and words[-1].removeprefix("--") in new and not word.startswith("--"):
            words.pop()  # with its value
        elif not (word.startswith("--") and "=" in word and word[2:].partition("=")[0] in new):
            words.append(word)
    words = [word for word in words if word.removeprefix("--") not in new or not word.startswith("--")]
    return shlex.join([*words, *(part for flag, value in new.items() for part in (f"--{flag}", value))])
