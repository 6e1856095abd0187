"""From runs to `report.md` and `report.html`."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from gkd import __version__
from gkd.report.curves import bars, evaluation_curves, training_curves
from gkd.report.runs import Run, load_runs
from gkd.results import WHERE, figure_names, more_is_better, text_of, title_of, where_title
from gkd.whole_file import write_whole

FIGURES = "report_figures"
_SAMPLES = 4
# What tells most about a run, in this order.
_HEADLINES = (
    "dataset/forward_kl",
    "teacher/forward_kl",
    "on_policy/reverse_kl",
    "dataset/agreement",
    "teacher/agreement",
)
_METHOD = (
    "model_name_or_path teacher_model_name_or_path dataset_name lmbda beta seq_kd kd_ratio learning_rate max_steps "
    "num_train_epochs per_device_train_batch_size gradient_accumulation_steps max_new_tokens max_length seed"
).split()


def write_report(folders: list[str | Path] | str | Path, output_dir: str | Path) -> Path:
    """Writes the report of one run, or of several side by side, and returns the path of `report.html`.

    The pages appear whole or not at all. The HTML needs no other file; the Markdown links to `report_figures/`.

    Raises:
        ValueError: a folder holds nothing to report.
    """
    runs = load_runs([folders] if isinstance(folders, str | Path) else list(folders))
    out = Path(output_dir)
    out.mkdir(parents=True, exist_ok=True)
    context = _context(runs)
    context["training_curves"] = _save_pictures(out, context["training_curves"], "")
    for number, evaluation in enumerate(context["evaluations"]):
        for name in ("bars", "curves"):
            evaluation[name] = _save_pictures(out, evaluation[name], f"{name}_{number}_")
    environment = Environment(
        loader=PackageLoader("gkd.report"),
        undefined=StrictUndefined,
        autoescape=lambda name: name == "report.html",
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")  # of Markdown
    for name in ("report.md", "report.html"):
        write_whole(out / name, environment.get_template(name).render(**context))
    return out / "report.html"


def _save_pictures(out: Path, pictures: dict[str, str], prefix: str) -> list[dict[str, str]]:
    """The SVG files that the Markdown links to, and the same as data for the HTML."""
    made = []
    for title, svg in pictures.items():
        name = prefix + "".join(c if c.isalnum() else "_" for c in title.lower()).strip("_")
        path = out / FIGURES / f"{name}.svg"
        write_whole(path, svg)
        data = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
        made.append({"title": title, "file": f"{FIGURES}/{path.name}", "data": data})
    return made


def _context(runs: list[Run]) -> dict[str, Any]:
    data = list(dict.fromkeys(name for run in runs for name in run.data))
    return {
        "title": " / ".join(run.name for run in runs),
        "version": __version__,
        "runs": [_run_context(run) for run in runs],
        "evaluations": [_evaluation(name, [run.on(name) for run in runs]) for name in data],
        "training_curves": training_curves(runs),
        "settings": _settings(runs),
    }


def _evaluation(data: str, runs: list[Run]) -> dict[str, Any]:
    """All that was found on one set of held-out rows."""
    runs = [run for run in runs if run.results]
    columns = columns_of(runs)
    names = figure_names(columns)
    if len({column["beta"] for column in columns if column["model"] != "teacher"}) > 1:
        names = [name for name in names if not name.endswith("/loss")]  # of different divergences
    return {
        "data": data,
        "rows": " or ".join(str(rows) for rows in sorted({column["rows"] for column in columns})),
        "columns": columns,
        "sections": _table(columns, names),
        "sizes": _sizes(columns),
        "bars": bars(columns, _headlines(names)) if len(columns) > 1 else {},
        "curves": evaluation_curves(runs),
        "samples": [(run.name, samples) for run in runs if (samples := run.samples(_SAMPLES))],
    }


def _headlines(names: list[str]) -> list[str]:
    return [name for name in _HEADLINES if name in names] + [n for n in names if n.startswith("score/")]


def columns_of(runs: list[Run]) -> list[dict[str, Any]]:
    """One column a model: before and after of each run and what else was evaluated; equal ones once; then the teachers."""
    columns: list[dict[str, Any]] = []
    teachers: list[dict[str, Any]] = []
    for run in runs:
        for result in [r for r in (run.result("before"), run.final, *run.others) if r is not None]:
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
    """Whether two results are of one model: all figures equal, but for the loss, which depends on the run's β."""
    figures = [
        {name: estimate["value"] for name, estimate in r["metrics"].items() if not name.endswith("/loss")} | {"data": r["data"]}
        for r in (a, b)
    ]  # fmt: skip
    return figures[0] == figures[1]


def _table(columns: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    sections: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        where = name.split("/")[0]
        cells = [text_of(name, c["metrics"][name]) if name in c["metrics"] else "" for c in columns]
        split = [cell.split(" ", 1) if cell else ["", ""] for cell in cells]
        sections.setdefault(where, []).append({"title": title_of(name), "cells": split})
    task = f"Task, compared with {columns[0]['references']}"
    titles = {where: task if where == "score" else f"On {WHERE[where]}" for where in sections}
    return [{"title": titles[where], "rows": rows} for where, rows in sections.items()]


def _sizes(columns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"title": "parameters", "cells": [f"{c['parameters'] / 1e6:,.4g}M" for c in columns]},
        {"title": "weights as loaded", "cells": [f"{c['gib']:.2f} GiB" for c in columns]},
        {"title": "generating here, tokens/s", "cells": [f"{c['tokens_per_second']:,.0f}" for c in columns]},
    ]


def _run_context(run: Run) -> dict[str, Any]:
    first = run.on(run.data[0]) if run.data else run
    before, after, teacher = first.result("before"), first.final, first.result("teacher")
    hardware = run.record.get("hardware", {})
    ranks = hardware.get("ranks", 1)
    step, steps = run.state.get("global_step", 0), run.state.get("max_steps", 0)
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
        "headlines": [_headline(n, before, after, teacher) for n in _headlines(figure_names([after]))]
        if before and after
        else [],
        "smaller": _smaller(after, teacher),
        "data": run.record.get("data", {}),
        "versions": run.record.get("versions", {}),
        "best": Path(run.state["best_model_checkpoint"]).name if run.state.get("best_model_checkpoint") else None,
        "evaluated": bool(run.results),
        "trained": bool(run.steps),
    }


def _headline(name: str, before, after, teacher) -> dict[str, str]:
    """One figure of a run: before → after, and whether the change is more than the rows' chance."""
    change = after.get("change", {}).get(name)
    mark = "unclear"
    if change and (change["low"] > 0 or change["high"] < 0):
        mark = "better" if (change["value"] > 0) == more_is_better(name) else "worse"
    first, last = (
        text_of(name, r["metrics"][name]).split(" ")[0] if name in r["metrics"] else "?" for r in (before, after)
    )
    said = {"better": "better", "worse": "worse", "unclear": "no clear change"}[mark]
    return {
        "title": where_title(name),
        "values": f"{first} → {last}",
        "change": f"{said}: {text_of(name, change, sign=True)}" if change else "",
        "teacher": text_of(name, teacher["metrics"][name]).split(" ")[0] if teacher and name in teacher["metrics"] else "",
        "mark": mark,
    }  # fmt: skip


def _smaller(student, teacher) -> str:
    if not student or not teacher:
        return ""
    share = student["parameters"] / teacher["parameters"]
    speed = student["tokens_per_second"] / teacher["tokens_per_second"]
    return f"{share:.0%} of the teacher's parameters, {speed:.2g}× its speed"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _settings(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """What the runs were told: the flags of the method, and all others that any of them changed."""
    changed = dict.fromkeys(name for run in runs for name in run.record.get("changed", []))
    names = [*_METHOD, *(name for name in changed if name not in (*_METHOD, "output_dir"))]
    rows = [(name, ["" if run.flag(name) is None else str(run.flag(name)) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if any(values)]
