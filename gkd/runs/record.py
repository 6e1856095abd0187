"""`run.json` in a run's folder: what was trained on what and how, for evaluation, report, export and chat."""

import json
import os
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gkd import __version__
from gkd.io.errors import first_line
from gkd.io.files import read_json, write_json
from gkd.io.secrets import is_secret, public

NAME = "run.json"
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")
_MEND = "Put a copy of it back, or delete it: a run that is resumed then writes it anew, without comparing its flags."


class NoRecord(ValueError):
    """Neither a folder nor the one above it has a record."""


def mapping(value: Any) -> dict[str, Any]:
    """A part of a record; {} if it is not an object."""
    return value if isinstance(value, dict) else {}


def _plain(value: Any) -> Any:
    """A value in a form that JSON can hold."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def arguments_of(groups: tuple[Any, ...]) -> dict[str, Any]:
    """The values of these dataclasses of arguments, without secrets, as a record holds them."""
    arguments: dict[str, Any] = {}
    for group in groups:
        for item in fields(group):
            if item.init and not is_secret(item.name):
                arguments[item.name] = _plain(public(getattr(group, item.name)))
    return json.loads(json.dumps(arguments))  # turns enums into strings


def write_record(
    output_dir: str, groups: tuple[Any, ...], given: set[str], data: dict[str, Any], ranks: int, resumed: Any
) -> None:
    """Writes the run's record.

    Args:
        groups: the dataclasses of parsed arguments.
        given: the names of the arguments that the user gave.
        data: a summary of the rows, see `gkd.data.loading.summarize_rows`.
        ranks: the number of processes.
        resumed: the run that this one continues, a `gkd.runs.resume.Resumed`.
    """
    arguments = arguments_of(groups)
    history = resumed.history or [{"step": resumed.step, "arguments": arguments}]
    if resumed.changed:
        history = [*history, {"step": resumed.step, "changed": resumed.changed}]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record = {
        "arguments": arguments,
        "changed": [name for name in arguments if name in given],
        "history": history,
        "data": data,
        "fingerprints": resumed.fingerprints,
        "hardware": {"device": device, "ranks": ranks, "threads": torch.get_num_threads()},
        "versions": {"gkd": __version__, **{name: version(name) for name in _LIBRARIES}},
    }
    write_json(Path(output_dir, NAME), record)


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """The record of the run in `folder`, or of the run that the checkpoint in `folder` belongs to.

    Raises:
        NoRecord: there is none.
        ValueError: it is damaged.
    """
    for place in (Path(folder), Path(folder).resolve().parent):
        if (path := place / NAME).is_file():
            try:
                record = read_json(path)
            except ValueError as error:
                raise ValueError(f"{first_line(error)}. {_MEND}") from None
            if not isinstance(record, dict) or not isinstance(record.get("arguments"), dict):
                raise ValueError(f"{path} is damaged: it holds no arguments. {_MEND}")
            return record
    raise NoRecord(f"{folder}: no {NAME}, so this is not the folder of a train_gkd.py run (or of its checkpoint).")


def changes_in(record: dict[str, Any]) -> list[tuple[int, str, Any, Any]]:
    """Step, flag, old and new value of each change made by a resume; malformed entries are skipped."""
    changes = []
    history = record.get("history")
    for entry in history if isinstance(history, list) else []:
        step, changed = (entry.get(key) if isinstance(entry, dict) else None for key in ("step", "changed"))
        if isinstance(step, int) and isinstance(changed, dict):
            pairs = [(name, v) for name, v in changed.items() if isinstance(v, list) and len(v) == 2]
            changes += [(step, name, *pair) for name, pair in pairs if name.isidentifier()]
    return changes
