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


def is_cross_entropy(arguments: dict[str, Any]) -> bool:
    """Whether the loss of a run with these arguments is the cross-entropy of given text."""
    return on_text_alone(arguments) or (arguments.get("lmbda") == 0 and arguments.get("kd_ratio") == 0)


def is_guarded(arguments: dict[str, Any]) -> bool:
    """Whether `--rollout_guard` acts in a run with these arguments; auto: unless λ is 0 or 1 all the time."""
    guard, lmbda = arguments["rollout_guard"], arguments["lmbda"]
    if guard != "auto":
        return guard == "on"
    return lmbda == "auto" or arguments.get("lmbda_schedule", "constant") != "constant" or 0 < lmbda < 1


def on_text_alone(arguments: dict[str, Any]) -> bool:
    """Whether a server wrote the text of a run with these arguments, and nothing was compared with."""
    others = ("teacher_cache", "teachers", "teacher_url", "teacher_logprobs_url", "teacher_model_name_or_path")
    return bool(arguments.get("teacher_text_url")) and not any(arguments.get(name) for name in others)


def arguments_of(groups: tuple[Any, ...]) -> dict[str, Any]:
    """The values of these dataclasses of arguments, without secrets, as a record holds them: what JSON lacks as text."""
    arguments = {
        item.name: public(getattr(group, item.name))
        for group in groups
        for item in fields(group)
        if item.init and not is_secret(item.name)
    }
    as_text = json.dumps(arguments, default=lambda value: list(value) if isinstance(value, set) else str(value))
    return json.loads(as_text)


def write_record(
    output_dir: str, groups: tuple[Any, ...], given: set[str], data: dict[str, Any], ranks: int, resumed: Any
) -> None:
    """Writes the run's record.

    Args:
        groups: the dataclasses of parsed arguments.
        given: the names of the arguments that the user gave.
        data: of each part, see `gkd.data.loading.summarize_rows`.
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


def data_in(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The summary of each part of the data."""
    return {part: rows for part, rows in mapping(record.get("data")).items() if isinstance(rows, dict)}


def history_in(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of the history, {} for one that is no object."""
    history = record.get("history")
    return list(map(mapping, history)) if isinstance(history, list) else []


def changes_in(record: dict[str, Any]) -> list[tuple[int, str, Any, Any]]:
    """Step, flag, old and new value of each change made by a resume; malformed ones are skipped."""
    return [
        (entry["step"], name, *pair)
        for entry in history_in(record)
        if isinstance(entry.get("step"), int)
        for name, pair in mapping(entry.get("changed")).items()
        if name.isidentifier() and isinstance(pair, list) and len(pair) == 2
    ]
