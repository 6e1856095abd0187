"""Paths and models named on a command line: `~`, checks of models and output folders, text files. Imports no torch."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

# Flags that name a file or a folder. A shell expands `~` neither in --flag=~/x nor in a YAML file.
PATHS = frozenset(
    """model_name_or_path teacher_model_name_or_path student_adapter teacher_adapter dataset_name eval_dataset_name
    output_dir logging_dir resume_from_checkpoint prompts teacher_cache teacher_text_cache chat_template_path config deepspeed
    fsdp_config accelerator_config ssl_certfile ssl_keyfile run runs models student teacher inputs output plot tokenizer mix on_bad""".split()
)


def expand_user(value: Any) -> Any:
    """Expands `~` and `~name` at the start of a path, or of each path in a list; other values stay as they are."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(expand_user, value))
    if isinstance(value, (str, Path)) and str(value).startswith("~"):
        return type(value)(os.path.expanduser(value))
    return value


def check_model(flag: str, name: str, adapter: bool = False) -> None:
    """Checks that `name`, which `flag` gave, is a folder with a model (or with `adapter` a LoRA adapter), or may be a hub id.

    Raises:
        ValueError: there is no such folder, or no model in it.
    """
    if not name:
        raise ValueError(f"{flag}: no model is named.")
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{flag} {name}: a file. Give the folder that holds config.json, or a hub id.")
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(name):
            raise ValueError(f"{flag} {name}: no such folder.")
    elif not (folder / "config.json").is_file():
        if not (folder / "adapter_config.json").is_file():
            files = "neither config.json nor adapter_config.json" if adapter else "no config.json"
            last = next(iter(checkpoints_in(folder)), None)
            hint = f" Its last checkpoint is {last}." if last else ""
            raise ValueError(f"{flag} {name}: no model in this folder, {files}.{hint}")
        if not adapter:
            raise ValueError(
                f"{flag} {name} is a LoRA adapter, not a model: give its base model here, and this folder as "
                "--student_adapter or --teacher_adapter."
            )


def check_adapter(flag: str, name: str) -> None:
    """Checks that `name` is the folder of a LoRA adapter. Raises ValueError, naming `flag`, if it is not."""
    if not Path(name).is_dir():
        raise ValueError(f"{flag} {name}: no such folder.")
    if not (Path(name) / "adapter_config.json").is_file():
        raise ValueError(f"{flag} {name}: no adapter in this folder, no adapter_config.json.")


def not_loaded(flag: str, name: str, error: Exception, what: str = "") -> str:
    """The message for a name that passed `check_model` but can't be loaded, from a folder or the hub, and why."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if Path(name).is_dir():
        return f"{flag} {name}: {what or 'its config'} can't be loaded: {reason}"
    part = what and f"{what} can't be loaded: "
    return f"{flag} {name}: {part}no model there, neither a folder of this name nor on the hub: {reason}"


def check_output(flag: str, name: str | Path | None) -> None:
    """Checks that `name` is a folder that can be written to or created. Raises ValueError, which says why not."""
    if name in (None, "", "auto", "off") or os.environ.get("RANK", "0") != "0":  # the other ranks write nothing there
        return
    place = Path(name).absolute()
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{flag} {name}: {place} is a file, not a folder.")
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ValueError(f"{flag} {name}: nothing can be written to {place}: {error.strerror}.") from None


def read_text(path: str | os.PathLike) -> str:
    """Reads a UTF-8 text file, without its byte order mark. Raises OSError, or ValueError if it is not UTF-8."""
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} (0x{content[error.start]:02X}, line {line}). Convert it "
            "first, by `iconv -f ENCODING -t UTF-8` or an editor."
        ) from None


CHECKPOINT_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


def checkpoints_in(output_dir: str | os.PathLike) -> list[str]:
    """The folders of a run's checkpoints, highest step first; copies with other names (checkpoint-2-kept) don't count.

    Not ordered by time: clocks are set back, and differ between hosts.
    """
    folder = Path(output_dir)
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    steps = {int(match[1]): match[0] for name in names if (match := CHECKPOINT_NAME.fullmatch(name))}
    return [str(folder / steps[step]) for step in sorted(steps, reverse=True)]
