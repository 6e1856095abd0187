"""The tables that commands print: a finished run's summary, and results of evaluations."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from gkd.data.batch import Source
from gkd.io.console import print_table
from gkd.metrics.divergences import DIVERGENCES
from gkd.metrics.names import WHERE, figure_names, of_teachers, text_of, title_of
from gkd.report.curves import BY_SOURCE

_WRITERS = {Source.ON_POLICY: "student (on-policy)", Source.TEACHER: "teacher", Source.DATASET: "dataset"}


def print_summary(log_history: list[dict[str, Any]], output_dir: str, divergence: str = "jsd") -> None:
    """Prints the first and the last logged metrics of each source, and where the time went."""
    caption = "first → last log; KLs and entropies in nats per token"
    table = Table(title=f"GKD run in {escape(output_dir)}", caption=caption)
    table.add_column("text written by")
    ends = {s: (logs[0], logs[-1]) for s in Source if (logs := [e for e in log_history if f"{s.label}/loss" in e])}
    for source in ends:
        table.add_column(_WRITERS[source], justify="right")
    loss = "loss" if divergence == "jsd" else f"loss ({DIVERGENCES[divergence].title})"
    for name in BY_SOURCE:
        pairs = [[log.get(f"{source.label}/{name}") for log in logs] for source, logs in ends.items()]
        cells = ["" if None in pair else "{:.3g} → {:.3g}".format(*pair) for pair in pairs]
        table.add_row(loss if name == "loss" else title_of(name), *cells)
    print_table(table)
    steps = [entry for entry in log_history if "seconds_training" in entry]
    generating, training = (sum(e[f"seconds_{phase}"] for e in steps) for phase in ("generating", "training"))
    graphs = ""
    if captured := sum(e.get("seconds_capturing", 0.0) for e in steps):
        share = captured / (generating + training + captured)
        graphs = f", {captured:.1f} s capturing CUDA graphs, once ({share:.1%} of the run)"
    print(f"{generating:.0f} s generating, {training:.0f} s training{graphs}.")
    if any("teacher_text/answers" in entry for entry in log_history):
        names = ("answers", "prompt_tokens", "completion_tokens")
        answers, read, written = (sum(e.get(f"teacher_text/{name}", 0) for e in log_history) for name in names)
        print(f"The teacher's server gave {answers:,} answers, of {read:,} tokens in prompts and {written:,} in text.")


def print_results(results: list[dict[str, Any]], title: str) -> None:
    """Prints one column per model and one row per metric; and the change from `before` to `after`.

    Behind a metric come rows for the teachers, where the data has several.
    """
    changed = (r for r in results if r["model"] == "after" and r.get("change"))
    after = next(changed, None) if len(results) <= 4 else None  # where the table has room for its change
    caption = "KLs and entropies in nats per token."
    if after is not None:
        caption += " In brackets the 95 % interval of the change, by bootstrap over rows."
    table = Table(title=escape(title), caption=caption)
    table.add_column("", min_width=20)
    for result in results:
        table.add_column(escape(result["model"]), justify="right")
        if result is after:
            table.add_column("change", justify="right", no_wrap=True)
    section = None
    for name in figure_names(results):
        where = name.split("/")[0]
        if where != section:
            table.add_section()
            table.add_row(f"[bold]{'task' if where == 'score' else f'on {WHERE[where]}'}[/bold]")
            section = where
        of_each = ((f"  {label}", parts) for label, parts in of_teachers(name, results))
        for row, parts in ((title_of(name, results), results), *of_each):
            cells = []
            for result, part in zip(results, parts, strict=True):
                cells.append(text_of(name, part["metrics"][name]).split(" ")[0] if name in part["metrics"] else "")
                if result is after:
                    change = part.get("change", {})
                    cells.append(text_of(name, change[name], sign=True) if name in change else "")
            table.add_row(escape(row), *cells)
    print_table(table)
