"""Writes chat rows to a file: JSON as in the published sample, JSON lines, or Parquet, by the file's ending."""

import contextlib
import json
import os
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO

from gkd.data.rows import DataError, encoded
from gkd.io.files import naming, publish

SUFFIXES = (".json", ".jsonl", ".parquet")
_quote = json.encoder.encode_basestring  # the C encoder of one string; Chinese is not escaped


def dumps(value: Any) -> str:
    """A value as JSON. Raises DataError for what JSON can't hold: NaN, dates of a Parquet file, ..."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"JSON has no form for it: {error}.") from None


def _dump_message(message: dict[str, Any]) -> str:
    cells = (f"{_quote(key)}: {dumps(value)}" for key, value in message.items())
    return "{ " + ", ".join(cells) + " }"


def columns_of(row: dict[str, Any], completions: bool) -> dict[str, Any]:
    """A chat row with its prompt: as `messages` and `prompt`, or as `prompt` and `completion`."""
    messages = row["messages"]
    if completions:
        columns = {"prompt": messages[:-1], "completion": messages[-1:]}
    else:
        columns = {"messages": messages, "prompt": messages[:-1]}
    return columns | {name: value for name, value in row.items() if name != "messages"}


def dump_row(row: dict[str, Any], completions: bool = False) -> bytes:
    """One row, spaced as in the published sample: `{ "messages": [ {...}, ... ],\\n"prompt": [ ... ] }`, UTF-8.

    `columns_of` and `dumps` would write the same row, more slowly: the prompt twice. Raises DataError for text that is not
    Unicode (half of a surrogate pair, a byte that did not decode).
    """
    cells = [
        f'{{ "role": "{m["role"]}", "content": {_quote(m["content"])} }}' if len(m) == 2 else _dump_message(m)
        for m in row["messages"]
    ]
    prompt = ", ".join(cells[:-1])
    if completions:
        text = f'{{ "prompt": [ {prompt} ],\n"completion": [ {cells[-1]} ]'
    else:
        text = f'{{ "messages": [ {prompt}, {cells[-1]} ],\n"prompt": [ {prompt} ]'
    for column, value in row.items():
        if column != "messages":
            text += f',\n"{column}": {dumps(value)}'
    return encoded(text + " }")


class AsideFile:
    """A file written aside: `open`, `append`, `close`, then `commit` renames it. `discard` deletes it unless it is
    committed; it may be called at any time, even before `open`, since a signal may arrive between any two lines.

    An OSError (a full disk) names the file.
    """

    _ending = b""  # what comes after the last row

    def __init__(self, path: Path):
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{token_hex(4)}.partial")
        self._file: BinaryIO | None = None

    def open(self) -> None:
        self._file = self._temporary.open("xb", buffering=1 << 20)

    def append(self, content: bytes) -> None:
        try:
            self._file.write(content)
        except OSError as error:
            with naming(self.path):  # entered only here, since that takes a while for each row
                raise error

    def _end(self) -> None:
        self._file.write(self._ending)

    def close(self) -> None:
        """Finishes the file, still aside: whatever can fail fails here, before any output is renamed."""
        with naming(self.path):
            self._end()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def commit(self) -> None:
        """Renames the closed file to its final name."""
        publish(self._temporary, self.path)

    def discard(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk has no room for what is still buffered
                self._file.close()
        self._temporary.unlink(missing_ok=True)


class Writer(AsideFile):
    """Chat rows as a JSON array; `completions` chooses their columns, see `columns_of`."""

    _ending = b" ]\n"

    def __init__(self, path: Path, completions: bool = False):
        super().__init__(path)
        self.rows = 0
        self.completions = completions

    def write(self, row: dict[str, Any]) -> None:
        self.append((b"[ " if self.rows == 0 else b",\n") + dump_row(row, self.completions))
        self.rows += 1

    def commit(self) -> None:
        """Renames the closed file. Without rows there is no file, not even that of an earlier run."""
        if self.rows:
            super().commit()
        else:
            self.path.unlink(missing_ok=True)


class LinesWriter(Writer):
    _ending = b""

    def write(self, row: dict[str, Any]) -> None:
        self.append(encoded(dumps(columns_of(row, self.completions))) + b"\n")
        self.rows += 1


class ParquetWriter(Writer):
    """Columns of role and content. Tool calls have no fixed columns: they need JSON."""

    _parquet = None

    def open(self) -> None:
        import pyarrow as pa  # here, since importing it takes a while and other files need none of it
        import pyarrow.parquet as pq

        super().open()
        message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
        self._schema = pa.schema([(name, message) for name in columns_of({"messages": []}, self.completions)])
        self._pending: list[dict[str, Any]] = []
        self._parquet = pq.ParquetWriter(self._file, self._schema)

    def write(self, row: dict[str, Any]) -> None:
        messages = row["messages"]
        if len(row) > 1 or any(len(message) > 2 for message in messages):
            raise DataError("it has tools or tool calls, which Parquet has no fixed columns for: write .jsonl.")
        encoded("".join(message["content"] for message in messages))
        self._pending.append(columns_of(row, self.completions))
        self.rows += 1
        if len(self._pending) == 4096:
            with naming(self.path):
                self._flush()

    def _flush(self) -> None:
        import pyarrow as pa  # `open` has imported it

        self._parquet.write_table(pa.Table.from_pylist(self._pending, self._schema))
        self._pending.clear()

    def _end(self) -> None:
        if self._pending:
            self._flush()
        self._parquet.close()

    def discard(self) -> None:
        if self._parquet is not None:
            with contextlib.suppress(OSError):
                self._parquet.close()
        super().discard()


def writer_of(path: Path, completions: bool) -> Writer:
    return {".jsonl": LinesWriter, ".parquet": ParquetWriter}.get(path.suffix, Writer)(path, completions)
