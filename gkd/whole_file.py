"""Files and folders that are whole or not there: written aside, then renamed over what was there before."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Writes a text file, and its folder if need be. The file aside ends in `.partial`; no other process has its name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{token_hex(4)}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def appearing(folder: str | os.PathLike) -> Iterator[Path]:
    """A new folder aside, under a name that nobody has, which takes its own name when all went well, else it is gone.

    Args:
        folder: must not exist, or be empty.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        aside = Path(scratch, folder.name)  # inside, since nobody else may read a temporary folder
        aside.mkdir()
        yield aside
        if folder.is_dir():
            folder.rmdir()  # an empty one
        os.replace(aside, folder)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes what JSON can hold, for people to read too."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False))
