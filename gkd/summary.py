"""What a finished run tells on the terminal."""

import sys
from typing import Any

from rich.markup import escape
from rich.table import Table

from gkd.sources import Source
from gkd.terminal import Console

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


def print_table(table: Table) -> None:
    """A log has no width, of which rich would think that it is 80; the table takes no more than it needs."""
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def print_summary(log_history: list[dict[str, Any]], output_dir: str) -> None:
    """Prints the first and the last logged metrics of each source, and where the time went."""
    table = Table(
        title=f"GKD run in {escape(output_dir)}", caption="first → last log; KLs and entropies in nats per token"
    )
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
    print_table(table)
    steps = [entry for entry in log_history if "seconds_training" in entry]
    generating, training = (sum(e[f"seconds_{phase}"] for e in steps) for phase in ("generating", "training"))
    captured = sum(e.get("seconds_capturing", 0.0) for e in steps)
    graphs = ""
    if captured:
        share = captured / (generating + training + captured)
        graphs = f", {captured:.1f} s capturing CUDA graphs, once ({share:.1%} of the run)"
    print(f"{generating:.0f} s generating, {training:.0f} s training{graphs}.")
