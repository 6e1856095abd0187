"""Whether quotes in a TSV file enclose cells or are text: the format has no rule for it, and both kinds are about."""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator


def has_quoting(lines: Iterable[str]) -> bool:
    """Whether quotes enclose cells, as spreadsheets write them. `lines` keep their line ends, as with newline="".

    Quotes are text where the file breaks CSV's rules for them, or where a quote at the start of a cell would swallow
    lines although every line has the header's number of fields as it stands.
    """
    tabs: Counter[int] = Counter()

    def counted() -> Iterator[str]:
        for line in lines:
            if line.strip("\r\n"):
                tabs[line.count("\t")] += 1
            yield line

    try:
        rows = sum(1 for cells in csv.reader(counted(), delimiter="\t", strict=True) if cells)
    except csv.Error:
        return False
    return rows == tabs.total() or len(tabs) > 1 or 0 in tabs
