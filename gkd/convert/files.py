"""Files of rows as streams of rows: JSON, JSON lines, CSV, TSV, Parquet and plain text, compressed or not, any encoding.

Memory does not grow with a file, a JSON array included. A row that can't be parsed is yielded with its problem, so that
the caller decides what becomes of it; what makes the rest of a file unreadable raises.
"""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from gkd.rows import DataError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

KINDS = {
    ".json": "JSON",
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "Parquet",
    ".txt": "text",
}
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_CHUNK = 1 << 20  # bytes
_SCAN = 16  # chunks
_FREQUENT = set(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事"
    "成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
)
csv.field_size_limit(1 << 30)


# A number that counts rows from 0 or lines from 1 (see `RowFile.unit`), the row, and what is wrong with it, or None.
Found = tuple[int, Any, str | None]


def _ending(name: str) -> str:
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


def _one_line(error: Exception, limit: int) -> str:
    return " ".join(str(error).split())[:limit]


class _Places:
    name: str
    unit: str

    def place(self, number: int) -> str:
        return f"{self.name}, {self.unit} {number}"


class RowFile(_Places):
    """One file of rows: `kind`, `compression`, `encoding` are what it turned out to be; iterate to read it.

    Raises, when made or while iterating:
        DataError: unknown file type, an encoding that can't be told, broken compression, JSON broken in mid-array.
    """

    def __init__(self, path: Path, encoding: str | None = None, name: str | None = None):
        self.path, self.name = path, name or str(path)
        with path.open("rb") as self._raw:
            start = self._raw.read(4)
        self.compression = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
        self.kind = self._kind()
        self.encoding = None if self.kind == "Parquet" else encoding or self._detect_encoding()
        if self.kind == "JSON":
            self.kind = self._json_kind()
        self.unit = "row" if self.kind in ("JSON array", "JSON objects", "Parquet") else "line"

    def _kind(self) -> str:
        ending = _ending(self.name)
        if self.name == "<stdin>":
            return "JSON"  # or text, told from its first character
        if ending not in KINDS:
            raise DataError(f"{self.name}: unknown file type; it should end in one of {', '.join(KINDS)} (.gz, .zst).")
        if ending == ".parquet" and self.compression:
            raise DataError(f"{self.name}: Parquet is compressed inside; unpack the file first.")
        return KINDS[ending]

    def position(self) -> int:
        """Bytes of the file read so far, for a progress bar."""
        return self._raw.tell() if not self._raw.closed else self.path.stat().st_size

    # ------------------------------------------------------------------ bytes and text

    @contextlib.contextmanager
    def _bytes(self) -> Iterator[BinaryIO]:
        """The decompressed bytes from the start. A handle of its own, so that `position` counts the file's bytes."""
        self._raw = self.path.open("rb")
        with self._raw as raw:
            try:
                if self.compression == "gzip":
                    yield gzip.GzipFile(fileobj=raw)
                elif self.compression == "zstd":
                    yield io.BufferedReader(zstd.ZstdFile(raw), _CHUNK)
                else:
                    yield raw
            except (EOFError, zlib.error, zstd.ZstdError, gzip.BadGzipFile) as error:
                raise DataError(f"{self.name}: broken {self.compression} file: {error}") from None

    @contextlib.contextmanager
    def _text(self, newline: str | None) -> Iterator[io.TextIOWrapper]:
        # A byte that does not decode becomes a lone surrogate: it spoils its row, which is found when it is written.
        with self._bytes() as stream:
            try:
                yield io.TextIOWrapper(stream, self.encoding, errors="surrogateescape", newline=newline)
            except UnicodeDecodeError as error:  # UTF-16 has bytes that nothing can stand for
                raise DataError(f"{self.name}: not {self.encoding} all through: {error.reason}.") from None

    def _detect_encoding(self) -> str:
        """UTF-8 with or without a mark, UTF-16 by its mark, or GB18030, from the first 16 MiB."""
        with self._bytes() as stream:
            start = stream.read(4)
            if start.startswith(codecs.BOM_UTF8):
                return "utf-8-sig"
            if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return "utf-16"
            decoder = codecs.getincrementaldecoder("utf-8")()
            chunk = start
            for _ in range(_SCAN):
                if not chunk:
                    return "utf-8"
                try:
                    decoder.decode(chunk)
                except UnicodeDecodeError as error:
                    line = error.object.rfind(b"\n", 0, error.start) + 1
                    sample = error.object[line:] + stream.read(1 << 16)
                    break
                chunk = stream.read(_CHUNK)
            else:
                return "utf-8"
        as_utf8 = sample.decode("utf-8", "replace")
        valid = sum(character > "\x7f" for character in as_utf8) - as_utf8.count("\ufffd")
        if valid >= as_utf8.count("\ufffd"):
            return "utf-8"  # with a few broken bytes, each of which spoils its own row
        # Nearly any bytes are some GB18030, Korean and Cyrillic ones too. But every third character of real Chinese is
        # one of the hundred that are most frequent, against one in forty by chance.
        foreign = [character for character in sample.decode("gb18030", "replace") if character > "\x7f"]
        if sum(character in _FREQUENT for character in foreign) < 0.1 * len(foreign):
            raise DataError(f"{self.name}: neither UTF-8 nor GB18030; name its encoding by --encoding.")
        return "gb18030"

    def _json_kind(self) -> str:
        """An array, one object a line, or objects that span lines."""
        with self._text(None) as text:
            start = text.read(1 << 16).lstrip()  # an array may be a single line
        if start.startswith("["):
            return "JSON array"
        if self.name == "<stdin>" and not start.startswith("{"):
            return "text"
        line, _, rest = start.partition("\n")
        try:
            _, end = json.JSONDecoder().raw_decode(line)
        except (ValueError, RecursionError):  # an object that goes on in the next line; in a .jsonl, a broken line
            return "JSON objects" if rest and ".jsonl" not in self.name else "JSON lines"
        return "JSON objects" if line[end:].strip() else "JSON lines"

    # ------------------------------------------------------------------ rows

    def __iter__(self) -> Iterator[Found]:
        read = {
            "JSON array": self._json_stream,
            "JSON objects": self._json_stream,
            "JSON lines": self._json_lines,
            "CSV": self._csv,
            "TSV": self._csv,
            "Parquet": self._parquet,
            "text": self._lines,
        }
        return read[self.kind]()

    def _json_stream(self) -> Iterator[Found]:
        start, number, array = 0, -1, self.kind == "JSON array"
        # yajl, the fast parser, reads half of a surrogate pair as "?" and refuses integers of 64 bits. Where one turns up,
        # the rest is read again by the parser in Python, which keeps both; the row of a half pair is then found to be bad.
        for parser in (ijson, ijson.get_backend("python")):
            with self._bytes() if self.encoding == "utf-8" else self._text(None) as source:
                stream = _Utf8(source)
                prefix = "item" if array else ""
                items = parser.items(stream, prefix, use_float=True, map_type=_Object, multiple_values=not array)
                try:
                    for number, row in enumerate(itertools.islice(items, start, None), start):
                        if stream.half_pair and parser is ijson:
                            start = number
                            break
                        twice = _repeated_key(row) if _Object.repeats else None
                        yield (number, row, twice and f"the key {twice!r} appears twice.")
                    else:
                        return
                except (ijson.JSONError, UnicodeError, RecursionError) as error:
                    repairable = (isinstance(error, UnicodeError) and stream.half_pair) or "overflow" in str(error)
                    if not (repairable and parser is ijson):
                        where, reason = self.place(number + 1), _one_line(error, 80)
                        raise DataError(f"{where}: broken JSON ({reason}); the rest can't be read.") from None
                    start = number + 1

    def _json_lines(self) -> Iterator[Found]:
        with self._text("\n") as text:
            for number, line in enumerate(text, 1):
                if line.strip():
                    try:
                        yield (number, _DECODER.decode(line), None)
                    except json.JSONDecodeError as error:
                        yield (number, line, f"broken JSON: {error.msg} (column {error.colno}).")
                    except RecursionError:
                        yield (number, line, "nested too deeply.")
                    except ValueError as error:
                        yield (number, line, str(error))

    def _csv(self) -> Iterator[Found]:
        with self._text("") as text:
            reader = csv.reader(text, delimiter="\t" if self.kind == "TSV" else ",", strict=True)
            try:
                header = next(reader, [])
                if len(set(header)) < len(header):
                    raise DataError(f"{self.name}, line 1: a column name appears twice in the header.")
                for cells in reader:
                    row, problem = dict(zip(header, cells, strict=False)), None
                    if not cells:
                        continue
                    if len(cells) != len(header):
                        problem = f"{len(cells)} fields, but the header names {len(header)}."
                    yield (reader.line_num, row, problem)
            except csv.Error as error:
                raise DataError(f"{self.place(reader.line_num)}: broken {self.kind}: {error}.") from None

    def _parquet(self) -> Iterator[Found]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._raw = self.path.open("rb")
        with self._raw as raw:
            try:
                batches = pq.ParquetFile(raw).iter_batches(batch_size=1024)
                number = 0
                for batch in batches:
                    for row in batch.to_pylist():
                        yield (number, row, None)
                        number += 1
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{self.name}: broken Parquet: {_one_line(error, 120)}") from None

    def _lines(self) -> Iterator[Found]:
        with self._text(None) as text:
            for number, line in enumerate(text, 1):
                if line.strip():
                    yield (number, {"prompt": line.strip()}, None)


class _Object(dict):
    """A JSON object that remembers a key which came twice. ijson builds rows ahead, so each object has to know."""

    __slots__ = ("repeated",)
    repeats = 0  # of all objects: none, usually, and then no row is searched

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            self.repeated = key
            _Object.repeats += 1
        dict.__setitem__(self, key, value)


def _repeated_key(value: Any) -> str | None:
    if isinstance(value, list):
        return next(filter(None, map(_repeated_key, value)), None)
    if isinstance(value, _Object):
        return getattr(value, "repeated", None) or _repeated_key(list(value.values()))
    return None


_HALF_PAIR = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)


class _Utf8:
    """Bytes, or text in any encoding, as the UTF-8 bytes that ijson reads; tells if half a surrogate pair went by.

    An escape near the end of what was read waits for the next read, so that each is judged before ijson sees it.
    """

    def __init__(self, source: BinaryIO | io.TextIOWrapper):
        self._source, self._held, self._before, self.half_pair = source, b"", b"", False

    def read(self, size: int) -> bytes:
        while True:
            chunk = self._source.read(size)
            if isinstance(chunk, str):
                chunk = chunk.encode("utf-8", "surrogateescape")
            data = self._held + chunk
            cut = data.find(b"\\", max(0, len(data) - 12)) if chunk else -1  # a pair has 12 bytes
            cut = len(data) if cut < 0 else cut
            if b"\\ud" in data or b"\\uD" in data:
                start = len(self._before)
                matches = _HALF_PAIR.finditer(self._before + data)
                self.half_pair |= any(start <= match.start() < start + cut for match in matches)
            self._held, self._before = data[cut:], (self._before + data[:cut])[-6:]
            if cut or not chunk:
                return data[:cut]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} appears twice.")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


class HubRows(_Places):
    """A hub dataset's train split as a stream of rows, with the interface of `RowFile`."""

    kind, compression, encoding, unit = "hub dataset", None, None, "row"

    def __init__(self, name: str):
        from datasets import load_dataset

        from gkd.data import only_text

        self.name = name
        try:
            self._data = only_text(load_dataset(name, split="train", streaming=True), name)
        except DataError:
            raise
        except Exception as error:  # whatever the network or the hub's client raises
            reason = _one_line(error, 200)
            raise DataError(f"{name}: no such file or folder, and no hub dataset that can be read: {reason}") from None

    def position(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Found]:
        number = -1
        try:
            for number, row in enumerate(self._data):
                yield (number, row, None)
        except Exception as error:  # whatever the network or the hub's client raises
            reason = _one_line(error, 200)
            raise DataError(f"{self.place(number + 1)}: the rest can't be read: {reason}") from None


@contextlib.contextmanager
def open_inputs(names: list[str], encoding: str | None = None) -> Iterator[list[RowFile | HubRows]]:
    """Files, folders (all files of known types in them), `-` for a pipe, or hub ids; opened in this order.

    Raises:
        FileNotFoundError: nothing of this name.
        DataError: a folder without data, a hub dataset that can't be read, an unknown type or encoding.
    """
    with contextlib.ExitStack() as stack:
        found: list[RowFile | HubRows] = []
        for name in names:
            path = Path(name)
            if name == "-":  # kept on disk: what it is can be told only by reading it twice
                spool = stack.enter_context(tempfile.NamedTemporaryFile(prefix="gkd-stdin-"))
                shutil.copyfileobj(sys.stdin.buffer, spool)
                spool.flush()
                found.append(RowFile(Path(spool.name), encoding, "<stdin>"))
            elif path.is_dir():
                parts = sorted(p for p in path.rglob("[!.]*") if p.is_file() and _ending(p.name) in KINDS)
                if not parts:
                    raise DataError(f"{name}: no data file in this folder ({', '.join(KINDS)}).")
                found += [RowFile(part, encoding) for part in parts]
            elif path.exists():
                found.append(RowFile(path, encoding))
            elif path.suffix or name.startswith((".", "/", "~")) or name.count("/") > 1:
                raise FileNotFoundError(f"{name}: no such file or folder.")
            else:
                found.append(HubRows(name))
        yield found
