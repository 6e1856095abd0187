"""The plots of a report: one small SVG each, so that a phone shows one per line and paper several."""

import io
import math
from typing import Any

from gkd.data.batch import Source
from gkd.metrics.divergences import divergence_name
from gkd.metrics.names import figure_names, is_share, text_of, title_of, where_title
from gkd.report.runs import Run

_COLORS = ("#1f5fbf", "#d9640b", "#2e7d32", "#8e24aa", "#00838f", "#b71c1c")
_WRITERS = {Source.ON_POLICY: "student", Source.TEACHER: "teacher", Source.DATASET: "dataset"}
_STYLES = {Source.ON_POLICY: "-", Source.TEACHER: "--", Source.DATASET: ":"}

# Key in the logs and unit of what is plotted for each source of text.
_BY_SOURCE = {
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
    ("grad_norm", "Gradient norm", ""),
)

# Held-out metrics that are plotted over the steps, besides the task metrics.
_HELD_OUT = [
    f"{where}/{name}"
    for where in ("dataset", "teacher", "on_policy")
    for name in ("loss", "forward_kl", "reverse_kl", "agreement", "student_perplexity")
] + [f"on_policy/{name}" for name in ("student_entropy", "completion_length", "truncated", "repetition")]
_STEP = "optimizer step"


class _Panel:
    def __init__(self, title: str, unit: str = "", x: str = _STEP, height: float = 2.9, percent: bool = False):
        from matplotlib.figure import Figure  # here, since importing it takes a while and few commands draw
        from matplotlib.ticker import MaxNLocator

        self.title = title
        self.figure = Figure(figsize=(4.2, height), layout="constrained")
        self.axes = self.figure.subplots()
        # A title of the figure, not of the axes: long labels beside a bar leave these little room.
        self.figure.suptitle(title, fontsize=10, x=0.02, ha="left", fontweight="bold")
        self.axes.set_xlabel(x, fontsize=8.5)
        self.axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=x == _STEP))
        self.axes.set_ylabel(unit, fontsize=8.5)
        self.axes.tick_params(labelsize=8)
        self.axes.grid(alpha=0.25)
        self.axes.spines[["top", "right"]].set_visible(False)
        if percent:
            self.axes.yaxis.set_major_formatter(_percent())

    def svg(self, legend: str | None) -> str:
        import matplotlib  # here, as above

        low, high = self.axes.get_ylim()
        if low > 0 and low < 0.5 * high:
            self.axes.set_ylim(0, None)
        if len(self.axes.get_legend_handles_labels()[0]) > 1:
            self.axes.legend(fontsize=8, title=legend, title_fontsize=8, frameon=False)
        out = io.StringIO()
        # Text stays text: small files, and any script shows in the reader's own fonts.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gkd", "font.family": "sans-serif"}):
            self.figure.savefig(out, format="svg", metadata={"Date": None})
        return out.getvalue()


def training_curves(runs: list[Run]) -> dict[str, str]:
    """SVG by title: what the runs logged over their optimizer steps. With several runs, a colour is a run."""
    pictures = {}
    divergence = divergence_name(run.flag("divergence") for run in runs)
    for key, unit in _BY_SOURCE.items():
        title = title_of(key)
        title = title[:1].upper() + title[1:]
        if key == "loss":
            unit = "" if divergence is None else f"{divergence.title}, {divergence.unit}"
        panel, drawn = _Panel(title, unit, percent=unit.startswith("share")), False
        for i, run in enumerate(runs):
            for source in Source:
                points = _points(run, f"{source.label}/{key}")
                if points:
                    color = _COLORS[(i if len(runs) > 1 else source.value) % len(_COLORS)]
                    label = " ".join([*([run.name] if len(runs) > 1 else []), _WRITERS[source]])
                    _draw(panel, points, color, _STYLES[source], label)
                    drawn = True
        if drawn:
            pictures[title] = panel.svg("text by" if len(runs) == 1 else None)
    for key, title, unit in _OF_RUN:
        panel, drawn = _Panel(title, unit), False
        for i, run in enumerate(runs):
            if points := _points(run, key):
                _draw(panel, points, _COLORS[i % len(_COLORS)], "-", run.name)
                drawn = True
        if drawn:
            pictures[title] = panel.svg(None)
    return pictures


def evaluation_curves(runs: list[Run]) -> dict[str, str]:
    """SVG by title: held-out metrics over optimizer steps, with intervals; only those with more than two points."""
    pictures = {}
    results = [result for run in runs for result in run.results]
    for name in figure_names(results):
        if name.split("/")[0] != "score" and name not in _HELD_OUT:
            continue
        panel, most = _Panel(where_title(name, results), percent=is_share(name)), 0
        for i, run in enumerate(runs):
            points = {
                r["step"]: r["metrics"][name]
                for r in run.results
                if r["step"] is not None and _is_finite(r["metrics"].get(name))
            }
            most = max(most, len(points))
            if points:
                steps = sorted(points)
                spans = zip(*(_span(points[step]) for step in steps), strict=True)
                label = run.name if len(runs) > 1 else "student"
                values = [points[step]["value"] for step in steps]
                style = {"color": _COLORS[i % len(_COLORS)], "marker": "o", "markersize": 3, "capsize": 2}
                panel.axes.errorbar(steps, values, list(spans), **style, linewidth=1.3, label=label)
        teacher = runs[0].result("teacher")
        if teacher and _is_finite(teacher["metrics"].get(name)):
            panel.axes.axhline(teacher["metrics"][name]["value"], color="grey", linestyle="--", label="teacher")
        if most > 2:
            pictures[panel.title] = panel.svg(None)
    return pictures


def bars(columns: list[dict[str, Any]], names: list[str]) -> dict[str, str]:
    """SVG by title: metrics of several models as bars, with their intervals."""
    pictures = {}
    for name in names:
        shown = [column for column in columns if _is_finite(column["metrics"].get(name))]
        if not shown:
            continue
        panel = _Panel(where_title(name), x="", height=0.9 + 0.4 * len(shown))
        for i, column in enumerate(shown):
            value = column["metrics"][name]
            color = "#9aa5b1" if column["model"] == "before" else _COLORS[1 if column["model"] == "teacher" else 0]
            below, above = _span(value)
            interval = {"xerr": [[below], [above]], "capsize": 3, "error_kw": {"elinewidth": 1}}
            panel.axes.barh(i, value["value"], **interval, color=color, height=0.6)
            label, place = text_of(name, value).split(" ")[0], {"xytext": (5, 0), "textcoords": "offset points"}
            panel.axes.annotate(label, (value["high"], i), **place, va="center", fontsize=8)
        titles = [column["title"].replace(" = ", "\n= ") for column in shown]
        panel.axes.set_yticks(range(len(titles)), titles, fontsize=8)
        panel.axes.invert_yaxis()
        panel.axes.set_xlim(0, 1.2 * max(column["metrics"][name]["high"] for column in shown) or 1)
        panel.axes.xaxis.set_major_formatter(_percent() if is_share(name) else "{x:g}")
        pictures[panel.title] = panel.svg(None)
    return pictures


def _is_finite(estimate: dict[str, float] | None) -> bool:
    """Whether there is a value that can be drawn: those of a broken model are NaN."""
    return estimate is not None and all(math.isfinite(estimate[part]) for part in ("value", "low", "high"))


def _span(estimate: dict[str, float]) -> tuple[float, float]:
    """How far the interval reaches below and above the value."""
    return max(estimate["value"] - estimate["low"], 0.0), max(estimate["high"] - estimate["value"], 0.0)


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter  # here, as in `_Panel`

    return PercentFormatter(1.0)


def _points(run: Run, key: str) -> list[tuple[int, float]]:
    """Steps and values, without the closing log, which covers only the remaining seconds."""
    return [(log["step"], log[key]) for log in run.steps if key in log and "train_runtime" not in log]


def _draw(panel: _Panel, points: list[tuple[int, float]], color: str, style: str, label: str) -> None:
    marker = "." if len(points) < 60 else None
    panel.axes.plot(
        *zip(*points, strict=True), color=color, linestyle=style, marker=marker, linewidth=1.4, label=label
    )
