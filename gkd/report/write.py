"""Writes `report.md` and `report.html` of runs."""

import base64
import functools
import json
import re
import shlex
from operator import itemgetter
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from gkd import __version__
from gkd.io.files import refuse_links, write_whole
from gkd.io.terminal import in_markdown, visible
from gkd.metrics.divergences import DIVERGENCE_FLAGS, divergence_name
from gkd.metrics.names import WHERE, figure_names, of_teachers, text_of, title_of
from gkd.report.curves import bars, evaluation_curves, training_curves
from gkd.report.runs import Run, load_runs
from gkd.report.verdict import headline, text_quality, verdict
from gkd.runs.record import changes_in, data_in, is_cross_entropy, mapping, on_text_alone

FIGURES = "report_figures"
_SAMPLES = 4
# The metrics that say most about a run, in this order.
_HEADLINES = (
    "dataset/forward_kl",
    "teacher/forward_kl",
    "on_policy/reverse_kl",
    "dataset/agreement",
    "teacher/agreement",
)
_METHOD = (
    f"model_name_or_path teacher_model_name_or_path teachers teacher_url teacher_logprobs_url teacher_text_model dataset_name lmbda {' '.join(DIVERGENCE_FLAGS)} seq_kd "
    "kd_ratio learning_rate max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps max_new_tokens max_length seed"
).split()


def write_report(folders: list[str | Path] | str | Path, output_dir: str | Path) -> Path:
    """Writes the report of one run, or of several side by side, and returns the path of `report.html`.

    The pages are complete or absent. The HTML needs no other file; the Markdown links to `report_figures/`.

    Raises:
        ValueError: a folder holds nothing to report, or a link where the report goes.
    """
    runs = load_runs([folders] if isinstance(folders, str | Path) else list(folders))
    out = Path(output_dir)
    refuse_links(out)
    out.mkdir(parents=True, exist_ok=True)
    data = dict.fromkeys(name for run in runs for name in run.data)
    context = {
        "title": " / ".join(run.name for run in runs),
        "version": __version__,
        "runs": [_run_context(run) for run in runs],
        "training_curves": _save_pictures(out, training_curves(runs), ""),
        "evaluations": [_evaluation(name, [run.on(name) for run in runs], out, i) for i, name in enumerate(data)],
        "settings": _settings(runs),
    }
    for name in ("report.md", "report.html"):
        write_whole(out / name, _templates().get_template(name).render(**context))
    return out / "report.html"


@functools.cache
def _templates() -> Environment:
    """Compiles each page once in a process."""
    environment = Environment(
        loader=PackageLoader("gkd.report"),
        undefined=StrictUndefined,
        autoescape=lambda name: name == "report.html",
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"md": _line, "fenced": _fenced, "text": _text, "quoted": shlex.quote}
    return environment


def _line(value: Any) -> str:
    """Text from outside, as part of a line of Markdown."""
    return in_markdown(" ".join(str(value).split()))


def _fenced(value: Any, language: str = "text") -> str:
    """Text from outside, as a block of code whose fence is longer than any in the text."""
    text = visible(value)
    longest = max(map(len, re.findall("~+", text)), default=0)
    fence = "~" * max(longest + 1, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _text(value: Any) -> str:
    """A value of run.json for people: lists with commas, objects as JSON."""
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else str(value)


def _save_pictures(out: Path, pictures: dict[str, str], prefix: str) -> list[dict[str, str]]:
    """Saves the SVG files that the Markdown links to; returns them also as data for the HTML."""
    saved = []
    for title, svg in pictures.items():
        name = prefix + "".join(c if c.isalnum() else "_" for c in title.lower()).strip("_")
        path = out / FIGURES / f"{name}.svg"
        write_whole(path, svg)
        data = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
        saved.append({"title": title, "file": f"{FIGURES}/{path.name}", "data": data})
    return saved


def _evaluation(data: str, runs: list[Run], out: Path, number: int) -> dict[str, Any]:
    """All results on one set of held-out rows, the report's `number`th."""
    runs = [run for run in runs if run.results]
    columns = columns_of(runs)
    names = figure_names(columns)
    if len({(c.get("divergence"), c["beta"]) for c in columns if c["model"] != "teacher"}) > 1:
        names = [name for name in names if not name.endswith("/loss")]  # the losses are of different divergences
    return {
        "data": data,
        "rows": " or ".join(str(rows) for rows in sorted({column["rows"] for column in columns})),
        "columns": columns,
        "sections": _table(columns, names),
        "sizes": {
            # A server need not tell its model's size.
            "parameters": [f"{c['parameters'] / 1e6:,.4g}M" if c["parameters"] else "not known" for c in columns],
            "weights as loaded": [f"{c['gib']:.2f} GiB" if c["parameters"] else "not known" for c in columns],
            "generating here, tokens/s": speeds(columns),
        },
        "bars": _save_pictures(out, bars(columns, _headlines(names)) if len(columns) > 1 else {}, f"bars_{number}_"),
        "curves": _save_pictures(out, evaluation_curves(runs), f"curves_{number}_"),
        "samples": [(run.name, samples) for run in runs if (samples := run.samples(_SAMPLES))],
    }


def _headlines(names: list[str]) -> list[str]:
    return [name for name in _HEADLINES if name in names] + [n for n in names if n.startswith("score/")]


def columns_of(runs: list[Run]) -> list[dict[str, Any]]:
    """One column per model: each run's before, after and other results, equal ones once; then the teachers."""
    columns, teachers = [], []
    for run in runs:
        for result in run.students:
            title = f"{run.name}: {result['model']}" if len(runs) > 1 else result["model"]
            if twin := next((column for column in columns if _same(column, result)), None):
                twin["title"] += f" = {title}"
            else:
                columns.append({**result, "title": title})
        teacher = run.result("teacher")
        if teacher and not any(_same(teacher, other) for other in teachers):
            teachers.append({**teacher, "title": f"teacher {len(teachers) + 1}" if teachers else "teacher"})
    return columns + teachers


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two results are of the same model: equal metrics, but for the loss, which depends on the divergence."""
    values = [{n: e["value"] for n, e in r["metrics"].items() if not n.endswith("/loss")} for r in (a, b)]
    return a["data"] == b["data"] and values[0] == values[1]


def _table(columns: list[dict[str, Any]], names: list[str]) -> dict[str, list[tuple[str, list[list[str]]]]]:
    """The rows by their section: a title, and value and interval for each column, "" where it has none."""
    sections: dict[str, list[tuple[str, list[list[str]]]]] = {}
    for name in names:
        where = name.split("/")[0]
        section = f"Task, compared with {columns[0]['references']}" if where == "score" else f"On {WHERE[where]}"
        for title, parts in ((title_of(name, columns), columns), *of_teachers(name, columns)):
            figures = [part["metrics"].get(name) for part in parts]
            cells = [text_of(name, figure).split(" ", 1) if figure else ["", ""] for figure in figures]
            sections.setdefault(section, []).append((title, cells))
    return sections


def speeds(columns: list[dict[str, Any]]) -> list[str]:
    """Tokens per second. Models of one size are equally fast: they all show the range measured among them, which comes
    from other work on the machine and the lengths of the answers."""
    alike = [_speeds_alike(column, columns) for column in columns]
    return [" to ".join(dict.fromkeys(f"{end(speeds):,.0f}" for end in (min, max))) for speeds in alike]


def _speeds_alike(result: dict[str, Any], results: list[dict[str, Any]]) -> list[float]:
    """Tokens per second of those results whose models have the size of this one's."""
    size = itemgetter("parameters", "gib")
    return [other["tokens_per_second"] for other in results if size(other) == size(result)]


def _run_context(run: Run) -> dict[str, Any]:
    first = run.on(run.data[0]) if run.data else run
    before, after, teacher = first.result("before"), first.final, first.result("teacher")
    hardware = mapping(run.record.get("hardware"))
    ranks = hardware["ranks"] if isinstance(hardware.get("ranks"), int) else 1
    step, steps = run.state.get("global_step", 0), run.state.get("max_steps", 0)  # both 0 without a run
    cards = []
    if before and after:
        cards = [headline(name, before, after, teacher) for name in _headlines(figure_names([after]))]
        cards += text_quality(before, after, teacher)
    cost = []
    if run.steps:
        device = hardware.get("device", "device")
        cost = [
            ("optimizer steps", f"{step:,}" + (f" of {steps:,}: not finished" if step < steps else "")),
            ("time in steps", _duration(run.seconds)),
            (f"{'CPU' if device == 'CPU' else 'GPU'}-hours", f"{run.seconds * ranks / 3600:.3g} ({ranks} × {device})"),
            ("scored tokens", f"{run.tokens:,.0f}"),
        ]
    return {
        "name": run.name,
        "folder": str(run.folder),
        "cost": cost,
        "verdict": verdict(step >= steps, cards, bool(run.results)),
        "notes": run.notes,
        "cards": cards,
        "smaller": _smaller(before, after, teacher),
        "data": data_in(run.record),
        "changes": changes_in(run.record),
        "versions": mapping(run.record.get("versions")),
        "best": Path(run.state["best_model_checkpoint"]).name if run.state.get("best_model_checkpoint") else None,
        "evaluated": bool(run.results),
        "trained": bool(run.steps),
    }


def _smaller(before, student, teacher) -> str:
    if not student or not teacher:
        return ""
    alike = _speeds_alike(student, [result for result in (before, student) if result])
    speed = sum(alike) / len(alike) / teacher["tokens_per_second"]
    if not teacher["parameters"]:
        return f"{speed:.2g}× the teacher's speed"
    return f"{student['parameters'] / teacher['parameters']:.0%} of the teacher's parameters, {speed:.2g}× its speed"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _settings(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """The flags of the method, and all others that any of the runs was given."""
    given = [run.record.get("changed") for run in runs]
    changed = dict.fromkeys(n for names in given if isinstance(names, list) for n in names if str(n).isidentifier())
    names = [*_METHOD, *(name for name in changed if name not in (*_METHOD, "output_dir"))]
    rows = [(name, ["" if _overruled(run, name) else _text(run.flag(name)) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if any(values)]


def _overruled(run: Run, name: str) -> bool:
    """Whether a flag did nothing: the other of the two that set a run's length decided, another divergence, or none did."""
    arguments = mapping(run.record.get("arguments"))
    if name == "kd_ratio" and on_text_alone(arguments):
        return True
    if name in (*DIVERGENCE_FLAGS, "loss_temperature") and is_cross_entropy(arguments):
        return True
    if name in DIVERGENCE_FLAGS[1:]:
        divergence = divergence_name([run.flag("divergence")])
        return divergence is not None and name != divergence.flag
    steps = run.flag("max_steps")
    by_steps = isinstance(steps, int) and steps > 0
    return name == ("num_train_epochs" if by_steps else "max_steps")
