"""What a finished run tells: a table on the terminal, and its curves as a picture."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gkd.figures import new_figure, save_figure
from gkd.sources import Source

_WRITERS = {Source.ON_POLICY: "student (on-policy)", Source.TEACHER: "teacher", Source.DATASET: "dataset"}
_ROWS = {
    "loss": "loss",
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "agreement": "top-1 agreement",
    "student_entropy": "student entropy",
    "teacher_entropy": "teacher entropy",
    "completion_length": "completion tokens",
    "truncated": "share truncated",
}


def summarize(log_history: list[dict[str, Any]], output_dir: str) -> None:
    """Prints the table of a run and draws its picture, `training.png`, beside the model."""
    plot_runs({"training": log_history}, Path(output_dir, "training.png"))
    print_summary(log_history, output_dir)


def print_summary(log_history: list[dict[str, Any]], output_dir: str) -> None:
    """Prints the first and the last logged metrics of each source, and where the time went."""
    table = Table(title=f"GKD run in {output_dir}", caption="first → last log; KLs and entropies in nats per token")
    table.add_column("text written by")
    logs = {s: [entry for entry in log_history if f"{s.label}/loss" in entry] for s in Source}
    logs = {source: entries for source, entries in logs.items() if entries}
    for source in logs:
        table.add_column(_WRITERS[source], justify="right")
    for name, title in _ROWS.items():
        ends = [
            (entries[0].get(key), entries[-1].get(key)) for s, entries in logs.items() for key in [f"{s.label}/{name}"]
        ]
        table.add_row(title, *("" if None in pair else "{:.3g} → {:.3g}".format(*pair) for pair in ends))
    Console().print(table)
    steps = [entry for entry in log_history if "seconds_training" in entry]
    generating, training = (sum(e[f"seconds_{phase}"] for e in steps) for phase in ("generating", "training"))
    captured = sum(e.get("seconds_capturing", 0.0) for e in steps)
    graphs = ""
    if captured:
        share = captured / (generating + training + captured)
        graphs = f", {captured:.1f} s capturing CUDA graphs, once ({share:.1%} of the run)"
    print(
        f"{generating:.0f} s generating, {training:.0f} s training{graphs}. Model and training.png are in {output_dir}."
    )


def plot_runs(runs: dict[str, list[dict[str, Any]]], path: str | os.PathLike) -> None:
    """Draws loss and forward KL of each source over the optimizer steps of one run, or of several in a row.

    Args:
        runs: log history by title; each run starts where the one before it ended, behind a dotted line.
        path: of the picture, which appears whole or not at all.
    """
    figure, panels = new_figure(columns=2, width=11)
    for axes, name, title in zip(
        panels, ("loss", "forward_kl"), ("loss", "forward KL(teacher ‖ student)"), strict=True
    ):
        offset = 0
        for run, log_history in runs.items():
            if offset:
                axes.axvline(offset + 0.5, color="grey", linestyle=":")
            if len(runs) > 1:
                axes.annotate(run, (offset + 1, 1.01), xycoords=("data", "axes fraction"), color="grey")
            for source in Source:
                key = f"{source.label}/{name}"
                points = [(offset + entry["step"], entry[key]) for entry in log_history if key in entry]
                if points:
                    axes.plot(*zip(*points, strict=True), f"C{source.value}.-", label=_WRITERS[source])
            offset += max((entry.get("step", 0) for entry in log_history), default=0)
        axes.set(xlabel="optimizer step", ylabel=f"{title} (nats per token)", ylim=(0, None))
        axes.grid(alpha=0.3)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one entry a source
        axes.legend(handles.values(), handles.keys(), title="text by")
    save_figure(figure, path)
