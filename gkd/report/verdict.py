"""What a run changed, said honestly: cards with their colour, and the sentence on top of a report."""

from dataclasses import dataclass
from typing import Any

from gkd.metrics.names import more_is_better, text_of, title_of, where_title

Result = dict[str, Any]  # an entry of evaluation/results.json

# Of the model's own text; less is better of both.
_QUALITY = ("on_policy/repetition", "on_policy/truncated")
# A share of bad text, as much above the teacher's, is no better for having been there before.
_FAR = 0.3
_SAID = {"better": "better", "worse": "worse", "unclear": "no clear change"}


@dataclass
class Card:
    """`mark`: better, worse or unclear; `lines`: values and what is said of them; the verdict says `short` of a card that is
    unclear, with `values` of the others."""

    title: str
    mark: str
    lines: list[tuple[str, str]]
    teacher: str
    short: str
    values: str


def _mark(name: str, after: Result) -> str:
    """Whether a figure changed by more than the rows' chance, and to which side."""
    change = after.get("change", {}).get(name)
    if not change or change["low"] <= 0 <= change["high"]:
        return "unclear"
    return "better" if (change["value"] > 0) == more_is_better(name) else "worse"


def _value(name: str, result: Result | None) -> str:
    return text_of(name, result["metrics"][name]).split(" ")[0] if result and name in result["metrics"] else ""


def _line(name: str, before: Result, after: Result, mark: str) -> tuple[str, str]:
    values = f"{_value(name, before) or '?'} → {_value(name, after)}"
    change = after.get("change", {}).get(name)
    return values, f"{_SAID[mark]}: {text_of(name, change, sign=True)}" if change else ""


def headline(name: str, before: Result, after: Result, teacher: Result | None) -> Card:
    """One figure: before → after, and whether the change is more than the rows' chance."""
    mark, title = _mark(name, after), where_title(name)
    line = _line(name, before, after, mark)
    short = title if name.startswith("score/") else title[:1].lower() + title[1:]
    return Card(title, mark, [line], _value(name, teacher), short, line[0])


def text_quality(before: Result, after: Result, teacher: Result | None) -> list[Card]:
    """One card of how the student's own text reads: repetition and answers without an end. Red where either got worse,
    and where it stays far from the teacher's."""
    names = [name for name in _QUALITY if name in after["metrics"] and name in before["metrics"]]
    if not names:
        return []
    marks, lines, parts = [], [], []
    for name in names:
        mark = _mark(name, after)
        values, change = _line(name, before, after, mark)
        ours = after["metrics"][name]["value"]
        theirs = teacher["metrics"][name]["value"] if teacher and name in teacher["metrics"] else 0.0
        if mark != "worse" and ours > theirs + _FAR:
            mark, change = "worse", f"still far from the teacher. {change}".strip()
        if mark == "worse":
            parts.append(f"{title_of(name)} {values}")
        marks.append(mark)
        lines.append((f"{title_of(name)} {values}", change))
    mark = "worse" if "worse" in marks else "better" if "better" in marks else "unclear"
    shares = [f"{title_of(name)} {share}" for name in names if (share := _value(name, teacher))]
    values = ", ".join(parts or [line for line, _ in lines])
    return [
        Card("Text quality, of its own text", mark, lines, ", ".join(shares), "the quality of its own text", values)
    ]


def verdict(finished: bool, cards: list[Card], evaluated: bool) -> str:
    """The sentence on top: what got better, what did not, and what got worse or is bad."""
    start = "" if finished else "Not finished. "
    if not cards:
        why = "there is no evaluation from before training" if evaluated else "it was not evaluated on held-out rows"
        return f"{start}Whether the student got better is not known: {why}."
    by_mark = {
        mark: [card.short + (f" ({card.values})" if mark != "unclear" else "") for card in cards if card.mark == mark]
        for mark in _SAID
    }
    parts = [
        f"{title}: {_list(sentences)}"
        for title, sentences in (
            ("Worse or bad", by_mark["worse"]),
            ("better", by_mark["better"]),
            ("no clear change", by_mark["unclear"]),
        )
        if sentences
    ]
    text = "; ".join(parts)
    return f"{start}{text[:1].upper()}{text[1:]}."


def _list(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
