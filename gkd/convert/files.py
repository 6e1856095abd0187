"""Streams the rows of files: JSON, JSON lines, CSV, TSV, Parquet and plain text, compressed or not, in any encoding.

Memory does not grow with a file, a JSON array included. A row that can't be parsed is yielded with its problem, so that
the caller decides what to do with it; damage that makes the rest of a file unreadable raises.
"""

import contextlib
import csv
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gkd.convert.encodings import detect_encoding, named_encoding
from gkd.convert.packed import BROKEN, ENDINGS, compression_of, unpacked
from gkd.data.delimited import delimited_rows, form_of
from gkd.data.json_rows import DECODER, JsonStream, problem_of
from gkd.data.rows import DataError
from gkd.io.errors import one_line

KINDS = {
    ".json": "JSON",
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "Parquet",
    ".txt": "text",
}

# The number of a row from 0 or of a line from 1 (see `RowFile.unit`), the row, and what is wrong with it, or None.
NumberedRow = tuple[int, Any, str | None]


def ending_of(name: str) -> str:
    """A file name's last suffix, or the one before that of a compression."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in ENDINGS else path.suffix


class RowFile:
    """One file of rows, a zip archive's `member` perhaps, iterated to read it; what kind of file it is is detected.

    Raises, when constructed or while iterating:
        DataError: unknown file type, uncertain encoding, broken compression, JSON broken in mid-array.
    """

    def __init__(self, path: Path, encoding: str | None, name: str, member: zipfile.ZipInfo | None = None):
        self.path, self.name, self._member = path, name, member
        self.compression = self.encoding = None
        with self._bytes() as raw:
            self.compression = compression_of(raw.read(10))
        self.kind = self._kind()
        if self.kind != "Parquet":
            with self._bytes() as raw:
                self.encoding = named_encoding(raw, encoding) if encoding else detect_encoding(raw, name)
        if self.kind == "JSON":
            self.kind = self._json_kind()
        self.unit = "row" if self.kind in ("JSON array", "JSON objects", "Parquet") else "line"
        self._form: dict[str, Any] = {}
        if self.kind in ("CSV", "TSV"):
            with self._text("") as text:
                self._form = form_of(self.kind == "TSV", text)
        kind = f"{self.kind} (quotes are text)" if self._form.get("quoting") == csv.QUOTE_NONE else self.kind
        self.description = ", ".join(filter(None, (kind, self.compression, self.encoding)))

    def _kind(self) -> str:
        ending = ending_of(self.name)
        if self.name == "<stdin>":
            return "JSON"  # or text: decided by its first character
        if ending not in KINDS:
            raise DataError(
                f"{self.name}: unknown file type; it should end in one of {', '.join(KINDS)} ({', '.join(ENDINGS)}), or be "
                "a .zip of such files."
            )
        if ending == ".parquet" and (self.compression or self._member):
            raise DataError(f"{self.name}: Parquet is compressed inside; unpack the file first.")
        return KINDS[ending]

    def place(self, number: int) -> str:
        return f"{self.name}, {self.unit} {number}"

    def position(self) -> int:
        """Bytes of the file read so far, for a progress bar."""
        return self._raw.tell() if not self._raw.closed else self.path.stat().st_size

    @contextlib.contextmanager
    def _bytes(self) -> Iterator[BinaryIO]:
        """The decompressed bytes from the start. Opens the file itself, so that `position` counts the file's bytes."""
        self._raw = self.path.open("rb")
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(self._raw)
            try:
                if self._member is not None:
                    archive = stack.enter_context(zipfile.ZipFile(stream))
                    stream = stack.enter_context(archive.open(self._member))
                yield unpacked(stream, self.compression)
            except BROKEN as error:
                broken = self.compression or "zip"
                raise DataError(f"{self.name}: broken {broken} file: {one_line(error)[:120]}") from None

    @contextlib.contextmanager
    def _text(self, newline: str | None) -> Iterator[io.TextIOWrapper]:
        # A byte that does not decode becomes a lone surrogate: it spoils its row, which is noticed on writing.
        with self._bytes() as stream:
            try:
                yield io.TextIOWrapper(stream, self.encoding, errors="surrogateescape", newline=newline)
            except UnicodeError as error:  # UTF-16 has bytes that no surrogate can stand for
                reason = getattr(error, "reason", error)
                raise DataError(f"{self.name}: not {self.encoding} all through: {reason}.") from None

    def _json_kind(self) -> str:
        """An array, one object per line, or objects that span lines."""
        with self._text(None) as text:
            start = text.read(1 << 16).lstrip()  # an array may be a single line
        if start.startswith("["):
            return "JSON array"
        if self.name == "<stdin>" and not start.startswith("{"):
            return "text"
        line, _, rest = start.partition("\n")
        try:
            _, end = json.JSONDecoder().raw_decode(line)
        except (ValueError, RecursionError):  # an object that goes on in the next line, or a broken one
            return "JSON objects" if rest else "JSON lines"
        return "JSON objects" if line[end:].strip() else "JSON lines"

    def __iter__(self) -> Iterator[NumberedRow]:
        if self.kind == "Parquet":
            return self._parquet()
        if self.kind in ("CSV", "TSV"):
            return self._cells()
        return self._lines() if self.kind in ("JSON lines", "text") else self._json_stream()

    def _json_stream(self) -> Iterator[NumberedRow]:
        number = -1
        with self._text(None) as text:
            try:
                for number, (row, problem) in enumerate(JsonStream(text, self.kind == "JSON array")):
                    yield (number, row, problem)
            except json.JSONDecodeError as error:
                where = self.place(number + 1)
                raise DataError(f"{where}: broken JSON ({error.msg}); the rest can't be read.") from None

    def _lines(self) -> Iterator[NumberedRow]:
        is_json = self.kind == "JSON lines"
        with self._text("\n" if is_json else None) as text:  # JSON may hold other line breaks
            for number, line in enumerate(text, 1):
                if line.strip():
                    try:
                        yield (number, DECODER.decode(line) if is_json else {"prompt": line.strip()}, None)
                    except (ValueError, RecursionError) as error:
                        yield (number, line, problem_of(error, line))

    def _cells(self) -> Iterator[NumberedRow]:
        with self._text("") as text:
            rows = delimited_rows(text, self.name, self._form, self.kind)
            _, header, _ = next(rows)
            for number, cells, problem in rows:
                yield (number, cells if problem else dict(zip(header, cells, strict=True)), problem)

    def _parquet(self) -> Iterator[NumberedRow]:
        import pyarrow as pa  # here, since importing it takes a while and other files need none of it
        import pyarrow.parquet as pq

        self._raw = self.path.open("rb")
        with self._raw as raw:
            try:
                file = pq.ParquetFile(raw)
                if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
                    raise DataError(f"{self.name}: a column name appears twice.")
                batches = file.iter_batches(batch_size=1024)
                for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                    yield (number, row, None)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{self.name}: broken Parquet: {one_line(error)[:120]}") from None


class HubRows:
    """A hub dataset's train split as a stream of rows, with the interface of `RowFile`."""

    description, unit, place = "hub dataset", "row", RowFile.place

    def __init__(self, name: str):
        # Here, since importing datasets takes seconds, and only a hub dataset needs it.
        from datasets import load_dataset

        from gkd.data.loading import only_text

        self.name = name
        try:
            data = load_dataset(name, split="train", streaming=True)
        except Exception as error:  # whatever the network or the hub's client raises
            reason = one_line(error)[:200]
            raise DataError(f"{name}: no such file or folder, and no hub dataset that can be read: {reason}") from None
        self._data = only_text(data, name)

    def position(self) -> int:
        return 0

    def __iter__(self) -> Iterator[NumberedRow]:
        number = -1
        try:
            for number, row in enumerate(self._data):
                yield (number, row, None)
        except Exception as error:  # whatever the network or the hub's client raises
            reason = one_line(error)[:200]
            raise DataError(f"{self.place(number + 1)}: the rest can't be read: {reason}") from None
