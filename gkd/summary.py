"""What a finished run tells: a table on the terminal, and the loss as a picture."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gkd.sources import Source

_COLUMNS = {
    "loss": "loss",
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "agreement": "top-1 agreement",
    "completion_length": "tokens",
    "truncated": "truncated",
}


def print_summary(log_history: list[dict[str, Any]], output_dir: str) -> None:
    """Prints the first and the last logged metrics of each source, and where the time went."""
    table = Table(title=f"GKD run in {output_dir}", caption="first → last log of each source; KLs in nats per token")
    table.add_column("source")
    for title in _COLUMNS.values():
        table.add_column(title, justify="right")
    for source in Source:
        logs = [entry for entry in log_history if f"{source.label}/loss" in entry]
        if logs:
            cells = [
                f"{logs[0][key]:.3g} → {logs[-1][key]:.3g}" if key in logs[0] and key in logs[-1] else ""
                for key in (f"{source.label}/{name}" for name in _COLUMNS)
            ]
            table.add_row(source.label, *cells)
    Console().print(table)
    steps = [entry for entry in log_history if "seconds_training" in entry]
    generating, training = (sum(e[f"seconds_{phase}"] for e in steps) for phase in ("generating", "training"))
    print(f"{generating:.0f} s generating, {training:.0f} s training. The model is in {output_dir}.")


def plot_loss(log_history: list[dict[str, Any]], path: str | os.PathLike) -> None:
    """Draws the loss of each source over the optimizer steps; the picture appears whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for source in Source:
        points = [
            (entry["step"], entry[f"{source.label}/loss"]) for entry in log_history if f"{source.label}/loss" in entry
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=f"text by {source.label.replace('_', ' ')}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = Path(path).with_suffix(".partial.png")
    figure.savefig(temporary, dpi=150)
    plt.close(figure)
    temporary.replace(path)
