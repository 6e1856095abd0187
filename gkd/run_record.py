"""`run.json` in a run's folder: what was trained on what and how, for evaluation, report, export and chat."""

import json
import os
import re
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gkd import __version__
from gkd.whole_file import read_json, write_json

NAME = "run.json"
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")
# Names of values that must not travel: records go into reports, model cards, checkpoints and trackers. `eos_token` and
# `pad_token` are none.
_SECRET = re.compile(
    r"token|.*(hub|auth|access|api|hf|secret|bearer)_?token|.*api_?key|.*password|.*secret|.*credentials?|authorization",
    re.IGNORECASE,
)
_MASK = "***"


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


def write_record(
    output_dir: str, dataclasses: tuple[Any, ...], given: set[str], data: dict[str, Any], ranks: int
) -> None:
    """Writes the record, aside and then renamed.

    Args:
        dataclasses: the parsed arguments.
        given: the names of those that the user gave.
        data: a summary of the rows, see `gkd.data.summarize_rows`.
        ranks: the number of processes.
    """
    arguments: dict[str, Any] = {}
    for group in dataclasses:
        for item in fields(group):
            if item.init and not is_secret(item.name):
                arguments[item.name] = _plain(public(getattr(group, item.name)))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record = {
        "arguments": arguments,
        "changed": [name for name in arguments if name in given],
        "data": data,
        "hardware": {"device": device, "ranks": ranks, "threads": torch.get_num_threads()},
        "versions": {"gkd": __version__, **{name: version(name) for name in _LIBRARIES}},
    }
    write_json(Path(output_dir, NAME), record)


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """The record of the run in `folder`, or of the run that the checkpoint in `folder` belongs to.

    Raises:
        ValueError: there is none.
    """
    for place in (Path(folder), Path(folder).resolve().parent):
        if (place / NAME).is_file():
            return read_json(place / NAME)
    raise ValueError(f"{folder}: no {NAME}, so this is not the folder of a train_gkd.py run (or of its checkpoint).")
