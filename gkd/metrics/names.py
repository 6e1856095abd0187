"""Names of metrics: their titles in tables, on whose text they were measured, and whether more is better."""

from collections.abc import Iterable, Iterator
from typing import Any

from gkd.metrics.divergences import divergence_name

# What `--metrics` computes, see gkd.metrics.tasks.
METRICS = ("exact_match", "bleu", "chrf", "rouge", "math_verify", "reasoning_gym")

Estimate = dict[str, float]  # value, low, high

# Title of each metric, in the order of tables; and whether more is better (None: neither).
TITLES = {
    "loss": ("loss", False),  # `title_of` says which divergence it is
    "forward_kl": ("forward KL", False),
    "reverse_kl": ("reverse KL", False),
    "agreement": ("top-1 agreement", True),
    "top5_agreement": ("top-5 agreement", True),
    "student_perplexity": ("perplexity, student", False),
    "teacher_perplexity": ("perplexity, teacher", None),
    "student_bits_per_byte": ("bits per byte, student", False),
    "teacher_bits_per_byte": ("bits per byte, teacher", None),
    "student_entropy": ("entropy, student", None),
    "teacher_entropy": ("entropy, teacher", None),
    "aligned": ("tokens that begin together", None),
    "completion_length": ("tokens a completion", None),
    "truncated": ("cut off by the limit", False),
    "repetition": ("repeated 4-grams", False),
}
# On whose text a metric was measured.
WHERE = {
    "dataset": "the data's answers",
    "teacher": "the teacher's text",
    "on_policy": "its own text",
    "score": "task",
}
# For a line of progress, formatted with the value.
SHORT = {"forward_kl": "KL {:.3g}", "reverse_kl": "reverse {:.3g}", "agreement": "agree {:.0%}"}
_SHARES = ("agreement", "top5_agreement", "aligned", "truncated", "repetition")


def more_is_better(name: str) -> bool:
    """Whether more of a metric (with or without `eval_`) is better: not of losses, KLs, perplexities and the like."""
    last = name.split("/")[-1]
    return not last.endswith("loss") and bool(TITLES.get(last, (None, True))[1])


def title_of(name: str, results: Iterable[dict[str, Any]] = ()) -> str:
    """`on_policy/reverse_kl` or `reverse_kl` -> `reverse KL`; the loss has the name of the results' divergence."""
    last = name.split("/")[-1]
    if last == "loss" and (divergence := divergence_name(result.get("divergence") for result in results)):
        return divergence.title
    return TITLES.get(last, (last.replace("_", " "), True))[0]


def where_title(name: str, results: Iterable[dict[str, Any]] = ()) -> str:
    """`on_policy/reverse_kl` -> `Reverse KL, on its own text`."""
    where = name.split("/")[0]
    title = title_of(name, results) + ("" if where == "score" else f", on {WHERE[where]}")
    return title[:1].upper() + title[1:]


def is_share(name: str) -> bool:
    """Whether a metric is shown in percent."""
    return name.split("/", 1)[1] in _SHARES


def text_of(name: str, estimate: Estimate, sign: bool = False) -> str:
    """An estimate as `0.812 [0.79, 0.83]`, shares in percent; with `sign`, as a difference."""

    def text(number: float) -> str:
        form = ".1%" if is_share(name) else ",.0f" if abs(number) >= 1000 else ".3g"
        return format(number, ("+" if sign else "") + form)

    return f"{text(estimate['value'])} [{text(estimate['low'])}, {text(estimate['high'])}]"


def figure_names(results: list[dict[str, Any]]) -> list[str]:
    """The names of all metrics in these results, in the order of tables."""
    names = dict.fromkeys(name for result in results for name in result["metrics"])
    order = [f"{where}/{name}" for where in WHERE for name in TITLES]
    return sorted(names, key=lambda n: (list(WHERE).index(n.split("/")[0]), order.index(n) if n in order else 99))


def of_teachers(name: str, results: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Of a figure, for each teacher whose rows have it: a title with the number of rows, and for each result its part."""
    parts = [result.get("by_teacher", {}) for result in results]
    for label in dict.fromkeys(label for part in parts for label in part):
        part_of = [part.get(label, {"metrics": {}}) for part in parts]
        if rows := {part["rows"] for part in part_of if name in part["metrics"]}:
            count = " or ".join(map(str, sorted(rows)))
            yield f"of {label} ({count} {'row' if count == '1' else 'rows'})", part_of


def in_order(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results in the order of tables: before, steps, after, others as they came, the teacher."""
    ranks = {"before": 0, "after": 2, "teacher": 4}
    return sorted(results, key=lambda r: (ranks.get(r["model"], 3 if r["step"] is None else 1), r["step"] or 0))
