"""Which rows go on, and in which order: duplicates, length, held-out split, mixing, shuffling."""

import functools
import json
import random
import tempfile
import unicodedata
from array import array
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any

from gkd.convert.writers import dumps
from gkd.data.rows import encoded

Row = dict[str, Any]


def normalized_prompt(row: Row) -> str:
    """A prompt's text, NFKC-normalised and with its white space collapsed: equal for equal questions."""
    text = "\n".join([message["content"] for message in row["messages"][:-1]])
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.split())


def is_held_out(prompt: str, share: float) -> bool:
    """Decided by the prompt alone, so it stays on its side when the file grows."""
    digest = blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


class Spool:
    """Rows with their places parked on disk, read back in any order; memory holds 8 bytes a row."""

    def __init__(self):
        self._file = tempfile.TemporaryFile(prefix="gkd-rows-")  # noqa: SIM115 — deleted when the spool goes
        self._offsets: list[array] = []

    def start_source(self) -> None:
        self._offsets.append(array("Q"))

    def add(self, place: str, row: Row) -> None:
        line = encoded(dumps((place, row)))
        self._offsets[-1].append(self._file.tell())
        try:
            self._file.write(line + b"\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from None

    def rows(self, seed: int, weights: list[float] | None = None) -> Iterator[tuple[Callable[[], str], Row]]:
        """All rows shuffled; with `weights`, as many of each source as their proportion allows, none twice."""
        draw = random.Random(seed)
        chosen = array("Q")
        if weights is None:
            for offsets in self._offsets:
                chosen.extend(offsets)
        else:
            scale = min(len(offsets) / weight for offsets, weight in zip(self._offsets, weights, strict=True))
            for offsets, weight in zip(self._offsets, weights, strict=True):
                chosen.extend(draw.sample(offsets, round(scale * weight)))
        draw.shuffle(chosen)
        for offset in chosen:
            self._file.seek(offset)
            place, row = json.loads(self._file.readline())
            yield functools.partial(str, place), row
