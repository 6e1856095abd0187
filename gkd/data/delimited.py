"""CSV and TSV files: whether cells are quoted, and what is wrong with a file. No dependency, so it loads at once."""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gkd.data.rows import DataError

csv.field_size_limit(1 << 30)  # an answer may be longer than the 128 KiB of Python's default


def has_quoting(lines: Iterable[str]) -> bool:
    """Whether quotes in a TSV file enclose cells, as spreadsheets write them. No rule settles it; both kinds exist.

    Quotes are text where the file breaks CSV's rules for them; where all lines have the same number of cells only if
    quotes are text; and where a cell that is not enclosed holds a quote, which no writer that encloses cells produces.

    Args:
        lines: with their line ends, as with newline="".
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


def csv_form(path: Path) -> dict[str, Any]:
    """Delimiter and quoting of a UTF-8 file, as keyword arguments of both Python's reader and pandas."""
    if path.suffix != ".tsv":
        return {"delimiter": ",", "quoting": csv.QUOTE_MINIMAL}
    with path.open(encoding="utf-8-sig", newline="") as file:
        quoted = has_quoting(file)
    return {"delimiter": "\t", "quoting": csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE}


def checked_header(path: Path, form: dict[str, Any]) -> list[str]:
    """The column names of a file, each of whose rows must have as many cells.

    pandas would silently shift the cells of longer rows, fill up shorter ones, and drop quotes that end early.

    Raises:
        DataError: what is wrong, with the file and the line.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True, **form)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise DataError(f"{path}, line 1: a column name appears twice in the header.")
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(cells)} fields, but the header names {len(header)}."
                    )
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: broken CSV: {error}.") from None
    return header
