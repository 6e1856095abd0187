"""CSV and TSV files: whether cells are quoted, and what is wrong with a file. No dependency, so it loads at once."""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gkd.data.rows import DataError

csv.field_size_limit(1 << 30)  # an answer may be longer than the 128 KiB of Python's default


def _has_quoting(lines: Iterable[str]) -> bool:
    """Whether quotes in a TSV file enclose cells, as spreadsheets write them. No rule settles it; both kinds exist.

    Quotes are text where the file breaks CSV's rules for them; where all lines have the same number of cells only if
    quotes are text; and where a cell that is not enclosed holds a quote, which no writer that encloses cells produces.
    The lines have their ends, as with newline="".
    """
    tabs: Counter[int] = Counter()
    bare = False

    def counted() -> Iterator[str]:
        nonlocal bare
        for line in lines:
            if line.strip("\r\n"):
                tabs[line.count("\t")] += 1
                bare |= '"' in line and any('"' in cell and cell[0] != '"' for cell in line.split("\t"))
            yield line

    try:
        widths = Counter(len(cells) for cells in csv.reader(counted(), delimiter="\t", strict=True) if cells)
    except csv.Error:
        return False
    if len(tabs) > 1:
        return True
    same = widths == Counter({count + 1: lines for count, lines in tabs.items()})
    return not bare if same else 0 in tabs


def form_of(tabs: bool, lines: Iterable[str]) -> dict[str, Any]:
    """Delimiter and quoting of a CSV or TSV file, as keyword arguments of both Python's reader and pandas."""
    quoting = csv.QUOTE_NONE if tabs and not _has_quoting(lines) else csv.QUOTE_MINIMAL
    return {"delimiter": "\t" if tabs else ",", "quoting": quoting}


def delimited_rows(
    lines: Iterable[str], name: str, form: dict[str, Any], kind: str = "CSV"
) -> Iterator[tuple[int, list[str], str | None]]:
    """The header and each row that is not empty: its line, its cells, and what is wrong with it, or None.

    Raises:
        DataError: the rest can't be read, or a column's name appears twice; with the file's `name` and the line.
    """
    reader = csv.reader(lines, strict=True, **form)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{name}, line 1: a column name appears twice in the header.")
        yield 1, header, None
        for cells in filter(None, reader):
            differs = len(cells) != len(header)
            problem = f"{len(cells)} fields, but the header names {len(header)}." if differs else None
            yield reader.line_num, cells, problem
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num}: broken {kind}: {error}.") from None


def checked_file(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Column names and form (`form_of`) of a UTF-8 file, each of whose rows must have as many cells.

    pandas would silently shift the cells of longer rows, fill up shorter ones, and drop quotes that end early. Raises
    DataError, with the file and the line.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        form = form_of(path.suffix == ".tsv", file)
        file.seek(0)
        rows = delimited_rows(file, str(path), form)
        _, header, _ = next(rows)
        for line, _, problem in rows:
            if problem:
                raise DataError(f"{path}, line {line}: {problem}")
    return header, form
