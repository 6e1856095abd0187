"""Streams JSON rows, each with its problem, if any. Time is linear in a row's length; memory holds one row."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, TextIO

_CHUNK = 1 << 20  # characters
_CUT = 16  # characters: no escape or literal is longer, so an error further from a chunk's end is a real one
_SPACE = re.compile(r"[ \t\n\r]*")
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\Z)|[][{}]', re.DOTALL)
_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}
_SCALAR = re.compile(r"[^],}\s]*")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {next(key for key in row if counts[key] > 1)!r} appears twice.")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _deepest(text: str) -> int:
    """How many brackets are open at once, at most."""
    depth = deepest = 0
    for token in _STRING_OR_BRACKET.finditer(text):
        depth += _STEP.get(token[0], 0)
        deepest = max(deepest, depth)
    return deepest


def problem_of(error: Exception, text: str) -> str:
    """What is wrong with a row that `DECODER` refused with a ValueError or a RecursionError."""
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg} (column {error.colno})."
    if isinstance(error, RecursionError):
        return f"nested too deeply: {_deepest(text):,} levels of brackets."
    return str(error)


class JsonStream:
    """Iterates over the items of an array, or over values one after another, as (row, problem).

    A value that is JSON and still can't be used (a key that appears twice, too many brackets or digits) is given as its
    text. Raises json.JSONDecodeError where the rest can't be read.
    """

    def __init__(self, source: TextIO, array: bool):
        self._source, self._array = source, array
        self._text, self._at, self._ended = "", 0, False

    def __iter__(self) -> Iterator[tuple[Any, str | None]]:
        if not self._array:
            while self._next_character():
                yield self._value()
            return
        self._next_character()
        self._at += 1
        end = self._next_character()
        while end != "]":
            yield self._value()
            end = self._next_character()
            if end not in ("]", ","):
                raise json.JSONDecodeError("Expecting ',' delimiter", self._text, self._at)
            if end == ",":
                self._at += 1
                self._next_character()
        self._at += 1
        if self._next_character():
            raise json.JSONDecodeError("Extra data behind the array", self._text, self._at)

    def _read_on(self) -> None:
        """Reads as much again as is held, so that a value of many chunks is parsed a few times, not once per chunk."""
        held = self._text[self._at :]
        chunk = self._source.read(max(_CHUNK, len(held)))
        self._text, self._at, self._ended = held + chunk, 0, not chunk

    def _next_character(self) -> str:
        """Skips white space; "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read_on()

    def _value(self) -> tuple[Any, str | None]:
        while True:
            try:
                row, end = DECODER.raw_decode(self._text, self._at)
                problem = None
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _CUT
                if self._ended or not cut:
                    raise
                self._read_on()
                continue
            except (ValueError, RecursionError) as error:
                end = self._end_by_brackets()
                row = self._text[self._at : end]
                problem = problem_of(error, row)
            half = isinstance(row, int | float) and end > len(self._text) - _CUT  # perhaps: 1 of 1.5e10
            if self._ended or not half:
                self._at = end
                return row, problem
            self._read_on()

    def _end_by_brackets(self) -> int:
        """Where the current value ends, which the decoder refused, by counting brackets."""
        depth, position = 0, self._at
        while True:
            if self._text[self._at] not in "[{":
                end = _SCALAR.match(self._text, self._at).end()
                if end < len(self._text) or self._ended:
                    return end
            else:
                for token in _STRING_OR_BRACKET.finditer(self._text, position):
                    if token[0][0] == '"' and token.end() == len(self._text):
                        break  # perhaps half a string: looked at again when there is more
                    position = token.end()
                    depth += _STEP.get(token[0], 0)
                    if depth == 0:
                        return position
                if self._ended:
                    raise json.JSONDecodeError("the file ends within a row", self._text, len(self._text))
                position -= self._at
            self._read_on()
