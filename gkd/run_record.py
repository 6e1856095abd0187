"""`run.json` in a run's folder: what was trained on what and how, for evaluation, report, export and chat."""

import json
import os
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gkd import __version__

NAME = "run.json"
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")
# Values that must not travel: the record goes into reports and model cards.
_SECRET = ("hub_token", "push_to_hub_token", "token", "use_auth_token")


def _plain(value: Any) -> Any:
    """As JSON can hold it, without secrets."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if key not in _SECRET}
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
            if not item.init or item.name in _SECRET:
                continue
            arguments[item.name] = _plain(getattr(group, item.name))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record = {
        "arguments": arguments,
        "changed": [name for name in arguments if name in given],
        "data": data,
        "hardware": {"device": device, "ranks": ranks, "threads": torch.get_num_threads()},
        "versions": {"gkd": __version__, **{name: version(name) for name in _LIBRARIES}},
    }
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{NAME}.partial"
    temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, folder / NAME)


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """The record of the run in `folder`, or of the run that the checkpoint in `folder` belongs to.

    Raises:
        ValueError: there is none.
    """
    for place in (Path(folder), Path(folder).resolve().parent):
        if (place / NAME).is_file():
            return json.loads((place / NAME).read_text(encoding="utf-8"))
    raise ValueError(f"{folder}: no {NAME}, so this is not the folder of a train_gkd.py run (or of its checkpoint).")
