"""The summary of a conversion: what came in, what went out, and what the rows look like."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from gkd.data.rows import is_answer
from gkd.io.console import Console
from gkd.io.files import new_figure, save_figure

# A character of a script other than Latin; the group's name is the script.
_SCRIPT = re.compile(
    "(?P<Han>[\u3400-\u9fff\uf900-\ufaff])|(?P<Kana>[\u3040-\u30ff])|(?P<Hangul>[\uac00-\ud7af])"
    "|(?P<Cyrillic>[\u0400-\u04ff])|(?P<Arabic>[\u0600-\u06ff])|(?P<Devanagari>[\u0900-\u097f])"
    "|(?P<Thai>[\u0e00-\u0e7f])|(?P<Greek>[\u0370-\u03ff])"
)
SAMPLES = 3
_LISTED = 20  # notes of one kind that are printed


class Report:
    """Counts of a conversion; `print` shows them."""

    def __init__(self):
        self.read = self.bad = self.written = self.held_out = self.empty = self.duplicates = 0
        self.dropped: Counter[str] = Counter()  # by the flag that dropped them
        self.turns: Counter[int] = Counter()
        self.scripts: Counter[str] = Counter()
        self.tokens: list[int] = []
        self.samples: list[dict[str, Any]] = []
        self.detected: list[str] = []  # the form of each input, and the format of its rows
        self.passed_over: list[str] = []  # files that were not read, with the reason
        self._remarks: dict[str, list] = {}  # what is not written: number of rows, place of the first

    def remark(self, remarks: list[str], place: str) -> None:
        """Counts remarks on what a row holds that is not written."""
        for remark in remarks:
            if remark not in self._remarks and len(self._remarks) >= 1000:  # columns whose names are data
                remark = "other columns are not used"
            self._remarks.setdefault(remark, [0, place])[0] += 1

    def add(self, row: dict[str, Any], tokens: int | None) -> None:
        messages = row["messages"]
        self.written += 1
        self.empty += not is_answer(messages[-1])
        self.turns[[m["role"] for m in messages].count("user")] += 1
        text = messages[-2]["content"]
        script = None if text.isascii() else _SCRIPT.search(text)
        self.scripts[script.lastgroup if script else "Latin"] += 1
        if tokens is not None:
            self.tokens.append(tokens)
        if len(self.samples) < SAMPLES:
            self.samples.append(row)

    def print(self) -> None:
        console = Console(soft_wrap=True)
        table = Table(title="rows", show_header=False)
        table.add_row("read", f"{self.read:,}  ({escape('; '.join(self.detected))})")
        if self.bad:
            table.add_row("bad", f"{self.bad:,}")
        for flag, count in self.dropped.items():
            table.add_row(f"dropped by {flag}", f"{count:,}")
        table.add_row("written", f"{self.written:,}" + (f", {self.held_out:,} held out" if self.held_out else ""))
        table.add_row("with an empty answer", self._share(self.empty))
        table.add_row("with an earlier row's prompt", self._share(self.duplicates))
        turns = ", ".join(f"{n}: {self._share(count)}" for n, count in sorted(self.turns.items())[:6])
        table.add_row("by user turns", turns + (", ..." if len(self.turns) > 6 else ""))
        scripts = ", ".join(f"{name} {self._share(count)}" for name, count in self.scripts.most_common())
        table.add_row("script of the last question", scripts)
        console.print(table)
        remarks = sorted(self._remarks.items(), key=lambda item: -item[1][0])
        notes = [f"{remark}: {count:,} rows, the first is {place}" for remark, (count, place) in remarks]
        for title, lines in (("left out", notes), ("not read", self.passed_over)):
            for line in lines[:_LISTED]:
                console.print(f"{title}: {escape(line)}", highlight=False)
            if len(lines) > _LISTED:
                console.print(f"{title}: and {len(lines) - _LISTED:,} more", highlight=False)
        if self.tokens:
            for low, high, count in self.histogram():
                width = max(1, round(40 * count / len(self.tokens))) if count else 0
                bar = ("#" if console.options.ascii_only else "█") * width
                console.print(f"{low:>7,} to {high:>7,} tokens {bar} {count:,}", highlight=False)
        for row in self.samples:
            lines = (f"[bold]{escape(m['role'])}[/bold]: {escape(_short(m['content']))}" for m in row["messages"])
            console.print("─ sample\n" + "\n".join(lines), highlight=False)

    def _share(self, count: int) -> str:
        return f"{count:,} ({count / max(self.written, 1):.0%})"

    def histogram(self, bins: int = 10) -> list[tuple[int, int, int]]:
        """(shortest, longest, rows) of each bin of conversation lengths in tokens."""
        low, high = min(self.tokens), max(self.tokens)
        width = max(1, -(-(high - low + 1) // bins))
        counts = Counter((length - low) // width for length in self.tokens)
        return [(low + i * width, low + (i + 1) * width - 1, counts[i]) for i in range(max(counts) + 1)]

    def plot(self, path: Path) -> None:
        """Draws user turns, and token lengths if a tokenizer is named; the picture is complete or absent."""
        figure, axes = new_figure(columns=2 if self.tokens else 1, width=10)
        turns = sorted(self.turns)
        axes[0].bar(list(map(str, turns)), [self.turns[n] for n in turns])
        axes[0].set(xlabel="user turns", ylabel="rows")
        if self.tokens:
            axes[1].hist(self.tokens, bins=50)
            axes[1].set(xlabel="tokens of the templated conversation", ylabel="rows")
        save_figure(figure, path)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:160] + "..."
