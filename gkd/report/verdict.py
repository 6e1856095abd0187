"""The verdict on a run: cards that say what got better or worse, and the sentence on top of a report."""

from dataclasses import dataclass
from typing import Any

from gkd.metrics.names import more_is_better, text_of, title_of, where_title

Result = dict[str, Any]  # an entry of evaluation/results.json

# Measured on the student's own text. Less is better, down to the teacher's own value where it is known.
_QUALITY = ("on_policy/repetition", "on_policy/truncated")
# A share of bad text that is so far above the teacher's is bad, even if it was there before training.
_FAR = 0.3
_WORDS = {"better": "better", "worse": "worse", "unclear": "no clear change"}
_TOWARDS = _WORDS | {"better": "better, nearer to the teacher's", "worse": "worse, farther above the teacher's"}


@dataclass
class Card:
    """One result of a run. `mark`: better, worse or unclear. `lines`: values, and how they changed. The verdict names
    the card by `short`, followed by `values` unless it is unclear."""

    title: str
    mark: str
    lines: list[tuple[str, str]]
    teacher: str
    short: str
    values: str


def _mark(name: str, after: Result) -> str:
    """Whether a metric changed by more than chance over the rows, and in which direction."""
    change = after.get("change", {}).get(name)
    if not change or change["low"] <= 0 <= change["high"]:
        return "unclear"
    return "better" if (change["value"] > 0) == more_is_better(name) else "worse"


def _mark_towards(goal: float, name: str, before: Result, after: Result) -> str:
    """As `_mark`: whether what a metric has above `goal` changed, by more than the change's own uncertainty."""
    change = after.get("change", {}).get(name)
    if not change:
        return "unclear"
    farther = max(after["metrics"][name]["value"], goal) - max(before["metrics"][name]["value"], goal)
    rose = change["value"] > 0
    if abs(farther) <= (change["value"] - change["low"] if rose else change["high"] - change["value"]):
        return "unclear"
    return "worse" if farther > 0 else "better"


def _value(name: str, result: Result | None) -> str:
    return text_of(name, result["metrics"][name]).split(" ")[0] if result and name in result["metrics"] else ""


def _line(name: str, before: Result, after: Result, mark: str, words: dict[str, str] = _WORDS) -> tuple[str, str]:
    values = f"{_value(name, before) or '?'} → {_value(name, after)}"
    change = after.get("change", {}).get(name)
    return values, f"{words[mark]}: {text_of(name, change, sign=True)}" if change else ""


def headline(name: str, before: Result, after: Result, teacher: Result | None) -> Card:
    """The card of a metric: before → after, and whether that is more than chance over the rows."""
    mark, title = _mark(name, after), where_title(name)
    line = _line(name, before, after, mark)
    short = title if name.startswith("score/") else title[:1].lower() + title[1:]
    return Card(title, mark, [line], _value(name, teacher), short, line[0])


def text_quality(before: Result, after: Result, teacher: Result | None) -> list[Card]:
    """The card of the student's own text: repetition, and answers cut off by the limit. It is "worse" if either rose
    above the teacher's, or stays far above it."""
    names = [name for name in _QUALITY if name in after["metrics"] and name in before["metrics"]]
    if not names:
        return []
    marks, lines, worse = [], [], []
    for name in names:
        goal = teacher["metrics"][name]["value"] if teacher and name in teacher["metrics"] else None
        mark = _mark(name, after) if goal is None else _mark_towards(goal, name, before, after)
        values, change = _line(name, before, after, mark, _WORDS if goal is None else _TOWARDS)
        if mark != "worse" and after["metrics"][name]["value"] > (goal or 0.0) + _FAR:
            mark, change = "worse", f"still far from the teacher. {change}".strip()
        if mark == "worse":
            worse.append(f"{title_of(name)} {values}")
        marks.append(mark)
        lines.append((f"{title_of(name)} {values}", change))
    mark = "worse" if worse else "better" if "better" in marks else "unclear"
    shares = ", ".join(f"{title_of(name)} {share}" for name in names if (share := _value(name, teacher)))
    values = ", ".join(worse or [line for line, _ in lines])
    return [Card("Text quality, of its own text", mark, lines, shares, "the quality of its own text", values)]


def verdict(finished: bool, cards: list[Card], evaluated: bool) -> str:
    """The sentence on top: what got better, what did not, and what got worse or is bad."""
    start = "" if finished else "Not finished. "
    if not cards:
        why = "there is no evaluation from before training" if evaluated else "it was not evaluated on held-out rows"
        return f"{start}Whether the student got better is not known: {why}."
    parts = []
    for mark, title in (("worse", "worse or bad"), ("better", "better"), ("unclear", "no clear change")):
        named = [
            card.short + (f" ({card.values})" if mark != "unclear" else "") for card in cards if card.mark == mark
        ]
        if named:
            *others, last = named
            parts.append(f"{title}: " + (f"{', '.join(others)} and {last}" if others else last))
    text = "; ".join(parts)
    return f"{start}{text[:1].upper()}{text[1:]}."
