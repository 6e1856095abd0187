"""The plots of a report: one small SVG each, so that a phone shows one per line and paper several."""

import io
import math
from typing import Any

from gkd.data.batch import Source
from gkd.metrics.divergences import divergence_name
from gkd.metrics.names import figure_names, is_share, of_teachers, text_of, title_of, where_title
from gkd.report.runs import Run
from gkd.runs.record import is_cross_entropy, mapping

_COLORS = ("#1f5fbf", "#d9640b", "#2e7d32", "#8e24aa", "#00838f", "#b71c1c")
_WRITERS = {Source.ON_POLICY: ("student", "-"), Source.TEACHER: ("teacher", "--"), Source.DATASET: ("dataset", ":")}

# Key in the logs and unit of what is plotted, and told at a run's end, for each source of text.
BY_SOURCE = {
    "loss": "",  # that of the divergence
    "forward_kl": "nats per token, teacher ‖ student",
    "reverse_kl": "nats per token, student ‖ teacher",
    "agreement": "share of tokens",
    "student_entropy": "nats per token",
    "teacher_entropy": "nats per token",
    "completion_length": "tokens",
    "truncated": "share of completions",
}
# Key in the logs, title and unit of what is plotted for the whole run.
_OF_RUN = (
    ("tokens_per_second", "Speed", "scored tokens per second"),
    ("seconds_generating", "Time generating", "seconds per log"),
    ("seconds_training", "Time training", "seconds per log"),
    ("peak_memory_gib", "Peak memory of a GPU", "GiB"),
    ("learning_rate", "Learning rate", ""),
    ("lmbda", "λ, of on-policy steps", ""),
    ("grad_norm", "Gradient norm", ""),
)

# Held-out metrics that are plotted over the steps, besides the task metrics.
_HELD_OUT = [
    f"{where}/{name}"
    for where in ("dataset", "teacher", "on_policy")
    for name in ("loss", "forward_kl", "reverse_kl", "agreement", "student_perplexity")
] + [f"on_policy/{name}" for name in ("student_entropy", "completion_length", "truncated", "repetition")]


def _new_axes(title: str, unit: str = "", x: str = "optimizer step", height: float = 2.9, percent: str = "") -> Any:
    """The axes of a new plot. `percent`: the axis that shows shares, "x" or "y"."""
    from matplotlib.figure import Figure  # here, since importing it takes a while and few commands draw
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(4.2, height), layout="constrained")
    axes = figure.subplots()
    # A title of the figure, not of the axes: long labels beside a bar leave these little room.
    figure.suptitle(title, fontsize=10, x=0.02, ha="left", fontweight="bold")
    axes.set_xlabel(x, fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=bool(x)))
    axes.set_ylabel(unit, fontsize=8.5)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if percent:
        getattr(axes, f"{percent}axis").set_major_formatter(PercentFormatter(1.0))
    return axes


def _svg(axes: Any, legend: str | None = None) -> str:
    import matplotlib  # here, as above

    low, high = axes.get_ylim()
    if low > 0 and low < 0.5 * high:
        axes.set_ylim(0, None)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=8, title=legend, title_fontsize=8, frameon=False)
    out = io.StringIO()
    # Text stays text: small files, and any script shows in the reader's own fonts.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gkd", "font.family": "sans-serif"}):
        axes.figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def training_curves(runs: list[Run]) -> dict[str, str]:
    """SVG by title: what the runs logged over their optimizer steps. With several runs, a colour is a run."""
    pictures, several = {}, len(runs) > 1
    names = [f"{run.name} " if several else "" for run in runs]
    divergence = divergence_name(run.flag("divergence") for run in runs)
    for key, unit in BY_SOURCE.items():
        title = title_of(key)
        if key == "loss" and all(is_cross_entropy(mapping(run.record.get("arguments"))) for run in runs):
            unit = "cross-entropy, nats per token"
        elif key == "loss" and divergence is not None:
            unit = f"{divergence.title}, {divergence.unit}"
        lines = [
            (points, i if several else source.value, style, names[i] + writer)
            for i, run in enumerate(runs)
            for source, (writer, style) in _WRITERS.items()
            if (points := _points(run, f"{source.label}/{key}"))
        ]
        pictures |= _lines(title[:1].upper() + title[1:], unit, lines, None if several else "text by")
    for key, title, unit in _OF_RUN:
        lines = [(points, i, "-", run.name) for i, run in enumerate(runs) if (points := _points(run, key))]
        pictures |= _lines(title, unit, lines)
    return pictures


def _lines(
    title: str, unit: str, lines: list[tuple[list[tuple[int, float]], int, str, str]], legend: str | None = None
) -> dict[str, str]:
    """SVG by title of a plot of `lines`: points, number of the colour, style and label; {} if there are none."""
    if not lines:
        return {}
    axes = _new_axes(title, unit, percent="y" if unit.startswith("share") else "")
    for points, color, style, label in lines:
        look = {"color": _COLORS[color % len(_COLORS)], "linestyle": style, "linewidth": 1.4, "label": label}
        axes.plot(*zip(*points, strict=True), **look, marker="." if len(points) < 60 else None)
    return {title: _svg(axes, legend)}


def evaluation_curves(runs: list[Run]) -> dict[str, str]:
    """SVG by title: held-out metrics over optimizer steps, with intervals; only those with more than two points.

    Those of a single run also have lines for the teachers, where the data has several.
    """
    pictures = {}
    results = [result for run in runs for result in run.results]
    for name in figure_names(results):
        if name.split("/")[0] != "score" and name not in _HELD_OUT:
            continue
        measured = [(run.name if len(runs) > 1 else "student", _by_step(name, run.results)) for run in runs]
        if len(runs) == 1:
            for title, parts in of_teachers(name, results):
                of_rows = [result | part for result, part in zip(results, parts, strict=True)]
                measured.append((title, _by_step(name, of_rows)))
        if max(len(by_step) for _, by_step in measured) <= 2:
            continue
        title = where_title(name, results)
        axes = _new_axes(title, percent="y" if is_share(name) else "")
        for i, (label, by_step) in enumerate(measured):
            if by_step:
                steps, figures = zip(*sorted(by_step.items()), strict=True)
                values, spans = [figure["value"] for figure in figures], zip(*map(_span, figures), strict=True)
                look = {"marker": "o", "markersize": 3, "capsize": 2, "linewidth": 1.3}
                look |= {"color": _COLORS[i % len(_COLORS)], "label": label}
                axes.errorbar(steps, values, list(spans), **look)
        teacher = runs[0].result("teacher")
        if teacher and _is_finite(teacher["metrics"].get(name)):
            axes.axhline(teacher["metrics"][name]["value"], color="grey", linestyle="--", label="teacher")
        pictures[title] = _svg(axes)
    return pictures


def _by_step(name: str, results: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    return {
        r["step"]: r["metrics"][name] for r in results if r["step"] is not None and _is_finite(r["metrics"].get(name))
    }


def bars(columns: list[dict[str, Any]], names: list[str]) -> dict[str, str]:
    """SVG by title: metrics of several models as bars, with their intervals."""
    pictures = {}
    for name in names:
        shown = [column for column in columns if _is_finite(column["metrics"].get(name))]
        if not shown:
            continue
        title, colors = where_title(name), {"before": "#9aa5b1", "teacher": _COLORS[1]}
        axes = _new_axes(title, x="", height=0.9 + 0.4 * len(shown), percent="x" if is_share(name) else "")
        for i, column in enumerate(shown):
            value = column["metrics"][name]
            below, above = _span(value)
            interval = {"xerr": [[below], [above]], "capsize": 3, "error_kw": {"elinewidth": 1}}
            axes.barh(i, value["value"], **interval, color=colors.get(column["model"], _COLORS[0]), height=0.6)
            label, place = text_of(name, value).split(" ")[0], {"xytext": (5, 0), "textcoords": "offset points"}
            axes.annotate(label, (value["high"], i), **place, va="center", fontsize=8)
        titles = [column["title"].replace(" = ", "\n= ") for column in shown]
        axes.set_yticks(range(len(titles)), titles, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max(column["metrics"][name]["high"] for column in shown) or 1)
        if not is_share(name):
            axes.xaxis.set_major_formatter("{x:g}")
        pictures[title] = _svg(axes)
    return pictures


def _is_finite(estimate: dict[str, float] | None) -> bool:
    """Whether there is a value that can be drawn: those of a broken model are NaN."""
    return estimate is not None and all(math.isfinite(estimate[part]) for part in ("value", "low", "high"))


def _span(estimate: dict[str, float]) -> tuple[float, float]:
    """How far the interval reaches below and above the value."""
    return max(estimate["value"] - estimate["low"], 0.0), max(estimate["high"] - estimate["value"], 0.0)


def _points(run: Run, key: str) -> list[tuple[int, float]]:
    """Steps and values, without the closing log, which covers only the remaining seconds."""
    return [(log["step"], log[key]) for log in run.steps if key in log and "train_runtime" not in log]
