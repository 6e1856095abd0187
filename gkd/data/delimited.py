"""CSV and TSV files: which cells are quoted, and what is wrong with a file. No dependency, so it loads at once."""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gkd.data.rows import DataError

csv.field_size_limit(1 << 30)  # an answer may be longer than the 128 KiB of Python's default


def has_quoting(lines: Iterable[str]) -> bool:
    """Whether quotes in a TSV file enclose cells, as spreadsheets write them; there is no rule for it, and both kinds are
    about. `lines` keep their line ends, as with newline="".

    Quotes are text where the file breaks CSV's rules for them; where as text every line has as many cells, which CSV's
    rules would join; and where some cell holds a quote unenclosed, which no writer that encloses cells leaves so.
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
    """Delimiter and quoting of a file in UTF-8, as both Python's reader and pandas name them."""
    if path.suffix != ".tsv":
        return {"delimiter": ",", "quoting": csv.QUOTE_MINIMAL}
    with path.open(encoding="utf-8-sig", newline="") as file:
        quoted = has_quoting(file)
    return {"delimiter": "\t", "quoting": csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE}


def checked_header(path: Path, form: dict[str, Any]) -> list[str]:
    """The column names of a file whose every row has as many cells.

    pandas shifts the cells of rows that have more, fills up those that have fewer, and drops quotes that end early.

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
