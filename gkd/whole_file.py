"""Small files that are whole or not there: written aside, then renamed over what was there before."""

import json
import os
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


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes what JSON can hold, for people to read too."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False))
