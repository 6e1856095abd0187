"""`run.json` in a run's folder: what was trained on what and how, for evaluation, report, export and chat."""

import json
import os
import re
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gkd import __version__
from gkd.fallback import first_line
from gkd.whole_file import read_json, write_json

if TYPE_CHECKING:
    from gkd.resume import Resumed

NAME = "run.json"
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")
# Names of values that must not travel: records go into reports, model cards, checkpoints and trackers. `eos_token` and
# `pad_token` are none.
_SECRET = re.compile(
    r"token|.*(hub|auth|access|api|hf|secret|bearer)_?token|.*api_?key|.*password|.*secret|.*credentials?|authorization",
    re.IGNORECASE,
)
_MASK = "***"
_MEND = "Put a copy of it back, or delete it: a run that is resumed then writes it anew, without comparing its flags."


class NoRecord(ValueError):
    """A folder, and the one above it, have no record."""


def mapping(value: Any) -> dict[str, Any]:
    """A part of a record, {} where it is no object."""
    return value if isinstance(value, dict) else {}


def is_secret(name: Any) -> bool:
    """Whether a flag or key of this name holds a secret: `hub_token`, or `token` in `--model_init_kwargs`."""
    return _SECRET.fullmatch(str(name).lstrip("-").replace("-", "_")) is not None


def public(value: Any) -> Any:
    """The value without what secret keys hold, at any depth; what is no dict or list is returned as it is."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items() if not is_secret(key)}
    return type(value)(map(public, value)) if type(value) in (list, tuple, set) else value


def without_secrets(argv: list[str]) -> list[str]:
    """Words of a command line with secrets as `***`: `--hub_token X`, `--hub_token=X`, and keys of a JSON object."""
    words, hidden = [], False
    for word in argv:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if hidden and not flag:
            words.append(_MASK)
        elif is_secret(flag) and equals:
            words.append(f"{flag}={_MASK}")
        else:
            words.append(f"{flag}{equals}{_masked_json(value)}")
        hidden = bool(flag) and not equals and is_secret(flag)
    return words


def _masked_json(word: str) -> str:
    if not word.lstrip().startswith(("{", "[")):
        return word
    try:
        value = json.loads(word)
    except ValueError:  # broken, so nobody can tell what it holds
        return _MASK
    masked = _masked(value)
    return word if masked == value else json.dumps(masked, ensure_ascii=False)


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _MASK if is_secret(key) else _masked(item) for key, item in value.items()}
    return [_masked(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def arguments_of(groups: tuple[Any, ...]) -> dict[str, Any]:
    """The parsed arguments of these dataclasses, as a record holds them."""
    arguments: dict[str, Any] = {}
    for group in groups:
        for item in fields(group):
            if item.init and not is_secret(item.name):
                arguments[item.name] = _plain(public(getattr(group, item.name)))
    return json.loads(json.dumps(arguments))  # enums are words there


def write_record(
    output_dir: str, groups: tuple[Any, ...], given: set[str], data: dict[str, Any], ranks: int, resumed: "Resumed"
) -> None:
    """Writes the record, aside and then renamed.

    Args:
        groups: the dataclasses of parsed arguments.
        given: the names of those that the user gave.
        data: a summary of the rows, see `gkd.data.summarize_rows`.
        ranks: the number of processes.
        resumed: what the run goes on from.
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
    """Step, flag, old and new value of each change of a resumed run; what has another form is left out."""
    changes = []
    history = record.get("history")
    for entry in history if isinstance(history, list) else []:
        step, changed = (entry.get(key) if isinstance(entry, dict) else None for key in ("step", "changed"))
        if isinstance(step, int) and isinstance(changed, dict):
            pairs = [(name, v) for name, v in changed.items() if isinstance(v, list) and len(v) == 2]
            changes += [(step, name, *pair) for name, pair in pairs if name.isidentifier()]
    return changes
