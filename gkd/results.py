"""From the records of an evaluation to averages with confidence intervals, `evaluation/results.json` and a table."""

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from gkd.fallback import first_line
from gkd.links import is_plain_name
from gkd.scoring import EvaluationStatistics
from gkd.sources import Source
from gkd.summary import print_table
from gkd.task_metrics import TaskMetrics
from gkd.whole_file import put_aside, write_json, write_whole

logger = logging.getLogger(__name__)

FOLDER = "evaluation"
Record = dict[str, Any]  # what an evaluation keeps of one row, see gkd.evaluation
Estimate = dict[str, float]  # value, low, high

_DRAWS = 1000  # bootstrap resamples
_PERPLEXITIES = {"student_nll": "student_perplexity", "teacher_nll": "teacher_perplexity"}


def _weights(rows: int) -> np.ndarray:
    """How often each bootstrap resample draws each row, (draws, rows); the same for each model, so models pair up."""
    return np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), size=_DRAWS).astype(np.float32)


def _ratios(records: list[Record]) -> dict[str, tuple[np.ndarray, np.ndarray, bool]]:
    """Each figure as (numerators, denominators) by row, and whether it is the exponential of their ratio."""
    rows = len(records)
    found: dict[str, tuple[np.ndarray, np.ndarray, bool]] = {}
    groups = {Source.DATASET.label: "given", Source.TEACHER.label: "given", Source.ON_POLICY.label: "own"}
    for label, key in groups.items():
        mine = [r.get(key, {}) if r.get(key, {}).get("by", label) == label else {} for r in records]
        tokens = np.array([m.get("tokens", 0.0) for m in mine])
        if not tokens.any():
            continue
        for name in EvaluationStatistics._fields:
            sums = np.array([m.get(name, 0.0) for m in mine])
            found[f"{label}/{_PERPLEXITIES.get(name, name)}"] = sums, tokens, name in _PERPLEXITIES
    ones = np.ones(rows)
    own = Source.ON_POLICY.label
    found[f"{own}/completion_length"] = np.array([float(len(r["tokens"])) for r in records]), ones, False
    for name in ("truncated", "repetition"):
        found[f"{own}/{name}"] = np.array([float(r[name]) for r in records]), ones, False
    for name in dict.fromkeys(name for r in records for name in r["scores"]):
        values = [r["scores"].get(name) for r in records]
        there = np.array([float(v is not None) for v in values])
        if there.any():
            found[f"score/{name}"] = np.array([v or 0.0 for v in values]), there, False
    return found


def figures_ahead(answered: bool, unanswered: bool, scores: list[str]) -> list[str]:
    """The names that `summarize_records` gives, before a record is there.

    Args:
        answered, unanswered: whether there are rows with an answer, and rows without.
        scores: the task metrics.
    """
    own = Source.ON_POLICY.label
    texts = [Source.DATASET.label] * answered + [Source.TEACHER.label] * unanswered + [own]
    names = [f"{text}/{_PERPLEXITIES.get(name, name)}" for text in texts for name in EvaluationStatistics._fields]
    names += [f"{own}/{name}" for name in ("completion_length", "truncated", "repetition")]
    return names + [f"score/{name}" for name in scores]


def _draws(part: tuple[np.ndarray, np.ndarray, bool], weights: np.ndarray) -> np.ndarray:
    sums, counts, exponential = part
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may hold no row that counts
        ratios = (weights @ sums) / (weights @ counts)
    return np.exp(ratios) if exponential else ratios


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def summarize_records(records: list[Record], task: TaskMetrics) -> dict[str, Estimate]:
    """Averages by name, with 95 % intervals by bootstrap over rows.

    `dataset/`, `teacher/`: on text by the dataset or the teacher, averaged over its tokens; `on_policy/`: on the
    model's own; `score/`: the task metrics, averaged over rows, or over the corpus as sacrebleu does.
    """
    weights, one = _weights(len(records)), np.ones((1, len(records)))
    found = {name: _estimate(_draws(part, one)[0], _draws(part, weights)) for name, part in _ratios(records).items()}
    pairs = [(r["text"], r["reference"]) for r in records if r["reference"] is not None]
    corpus = task.corpus_scores([text for text, _ in pairs], [reference for _, reference in pairs])
    for name, (value, low, high) in corpus.items():
        found[f"score/{name}"] = {"value": value, "low": low, "high": high}
    return found


def changes(before: list[Record], after: list[Record]) -> dict[str, Estimate]:
    """after - before of each figure that both have, over the rows that both have, resampled in pairs."""
    theirs = {record["row"]: record for record in before}
    after = [record for record in after if record["row"] in theirs]
    if not after:
        return {}
    weights, one = _weights(len(after)), np.ones((1, len(after)))
    old, new = _ratios([theirs[record["row"]] for record in after]), _ratios(after)
    return {
        name: _estimate(
            _draws(new[name], one)[0] - _draws(old[name], one)[0],
            _draws(new[name], weights) - _draws(old[name], weights),
        )
        for name in new
        if name in old
    }


def read_results(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The results in a run's (or an evaluation's) folder, [] if there are none.

    A damaged file is told of, put aside and written anew with the results that are whole in it.
    """
    path = Path(folder, FOLDER, "results.json")
    if not path.is_file():
        return []
    text = path.read_bytes().decode("utf-8", "replace")
    try:
        results = json.loads(text)["results"]
        if not all(map(_is_result, results)):
            raise ValueError("an entry is not a result")
        return results
    except (ValueError, TypeError, KeyError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else first_line(error)
    results = _whole_results(text)
    kept = f"Whole results, which are kept: {len(results)}"
    put_aside(path, problem, f"{kept}; eval_gkd.py finds the others again.")
    with suppress(OSError):  # a folder that can only be read
        write_json(path, {"results": results})
    return results


_RESULT = {"model", "step", "data", "rows", "beta", "references", "settings", "records", "parameters", "gib"}
_RESULT |= {"tokens_per_second", "metrics"}


def _is_result(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() >= _RESULT
        and all(isinstance(entry[name], str) for name in ("model", "data", "settings"))
        and all(type(entry[name]) in (int, float) for name in ("rows", "parameters", "gib", "tokens_per_second"))
        and (entry["step"] is None or type(entry["step"]) is int)
        and _are_figures(entry["metrics"])
        and _are_figures(entry.get("change", {}))
    )


def _are_figures(value: Any) -> bool:
    return isinstance(value, dict) and all(
        "/" in name
        and name.split("/")[0] in WHERE
        and isinstance(figure, dict)
        and all(type(figure.get(part)) in (int, float) for part in ("value", "low", "high"))
        for name, figure in value.items()
    )


def _whole_results(text: str) -> list[dict[str, Any]]:
    """The results before the place where a file is torn."""
    results, decode = [], json.JSONDecoder().raw_decode
    start = text.find("{", text.find("[")) if "[" in text else -1
    while start >= 0:
        try:
            entry, end = decode(text, start)
        except ValueError:
            break
        if _is_result(entry):
            results.append(entry)
        start = text.find("{", end)
    return results


def comparable(results: list[dict[str, Any]], data: str) -> list[dict[str, Any]]:
    """The results on these held-out data that were found as the latest of them was: rows, teacher, lengths, β."""
    mine = [result for result in results if result["data"] == data]
    return [result for result in mine if result["settings"] == mine[-1]["settings"]]


def read_records(path: str | os.PathLike, repair: bool = False) -> list[Record]:
    """The whole records in a file, in the order of their rows. Of a row that is there twice, the last one counts.

    A last line that a killed evaluation has torn is left out. So is any other line that is damaged.

    Args:
        repair: write the file anew without such lines; a damaged file is told of and put aside before.
    """
    path = Path(path)
    if not path.is_file():
        return []
    records, damaged = {}, []
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not (isinstance(record, dict) and record.keys() >= _RECORD and isinstance(record["row"], int)):
                raise ValueError
            records[record["row"]] = record
        except ValueError:
            damaged.append(number)
    records = [records[row] for row in sorted(records)]
    if repair and (damaged or torn):
        if damaged:
            where = f"line {damaged[0]}" + (f" and {len(damaged) - 1} others" if damaged[1:] else "")
            put_aside(path, where, f"Whole rows, which are kept: {len(records)}; the others are evaluated again.")
        write_records(path, records)
    return records


_RECORD = {"row", "prompt", "text", "tokens", "truncated", "repetition", "seconds", "reference", "reference_by"}


def write_records(path: str | os.PathLike, records: list[Record]) -> None:
    """One line a record."""
    write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def records_of(folder: str | os.PathLike, model: str, data: str, settings: str) -> list[Record]:
    """The records of a model that `results.json` lists, in the order of rows; [] where there is none."""
    for entry in read_results(folder):
        if (entry["model"], entry["data"], entry["settings"]) == (model, data, settings):
            path = Path(folder, FOLDER, "rows", str(entry["records"]))
            if not is_plain_name(entry["records"]) or path.is_symlink():
                where = Path(folder, FOLDER, "results.json")
                logger.warning("%s: `records` of %r names no file of evaluation/rows: left out.", where, model)
                return []
            records = read_records(path)
            return [record for record in records if "scores" in record]  # others are of an evaluation that was cut off
    return []


def add_result(folder: str | os.PathLike, result: dict[str, Any]) -> None:
    """Adds a result, in place of an earlier one of the same model on the same data."""

    def key(entry: dict[str, Any]) -> tuple[str, str]:
        return entry["model"], entry["data"]

    entries = [*(entry for entry in read_results(folder) if key(entry) != key(result)), result]
    write_json(Path(folder, FOLDER, "results.json"), {"results": entries})


# What tables show of the figures, in this order; and whether more is better.
TITLES = {
    "loss": ("JSD at the run's β", False),
    "forward_kl": ("forward KL", False),
    "reverse_kl": ("reverse KL", False),
    "agreement": ("top-1 agreement", True),
    "top5_agreement": ("top-5 agreement", True),
    "student_perplexity": ("perplexity, student", False),
    "teacher_perplexity": ("perplexity, teacher", None),
    "student_entropy": ("entropy, student", None),
    "teacher_entropy": ("entropy, teacher", None),
    "completion_length": ("tokens a completion", None),
    "truncated": ("cut off by the limit", False),
    "repetition": ("repeated 4-grams", False),
}
WHERE = {
    "dataset": "the data's answers",
    "teacher": "the teacher's text",
    "on_policy": "its own text",
    "score": "task",
}
_SHARES = ("agreement", "top5_agreement", "truncated", "repetition")


def more_is_better(name: str) -> bool:
    """Of a figure by its name, with or without `eval_` before it: False for losses, KLs, perplexities and the like."""
    last = name.split("/")[-1]
    return not last.endswith("loss") and bool(TITLES.get(last, (None, True))[1])


def title_of(name: str) -> str:
    """`on_policy/reverse_kl` -> `reverse KL`; task metrics keep their names."""
    last = name.split("/", 1)[1]
    return TITLES.get(last, (last.replace("_", " "), True))[0]


def where_title(name: str) -> str:
    """`on_policy/reverse_kl` -> `Reverse KL, on its own text`."""
    where = name.split("/")[0]
    title = title_of(name) if where == "score" else f"{title_of(name)}, on {WHERE[where]}"
    return title[:1].upper() + title[1:]


def is_share(name: str) -> bool:
    """Whether a figure is told in percent."""
    return name.split("/", 1)[1] in _SHARES


def text_of(name: str, estimate: Estimate, sign: bool = False) -> str:
    """`0.812 [0.79, 0.83]`, shares in percent; with `sign`, as a difference."""

    def text(number: float) -> str:
        form = ".1%" if is_share(name) else ",.0f" if abs(number) >= 1000 else ".3g"
        return format(number, ("+" if sign else "") + form)

    return f"{text(estimate['value'])} [{text(estimate['low'])}, {text(estimate['high'])}]"


def figure_names(results: list[dict[str, Any]]) -> list[str]:
    """The names of all figures of these results, in the order of tables."""
    there = dict.fromkeys(name for result in results for name in result["metrics"])
    order = [f"{where}/{name}" for where in WHERE for name in TITLES]
    return sorted(there, key=lambda n: (list(WHERE).index(n.split("/")[0]), order.index(n) if n in order else 99))


def in_order(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Before, steps, after and others as they came, the teacher last."""

    def place(result: dict[str, Any]) -> tuple[int, int]:
        rank = {"before": 0, "after": 2, "teacher": 4}.get(result["model"], 1 if result["step"] is not None else 3)
        return rank, result["step"] or 0

    return sorted(results, key=place)


def print_results(results: list[dict[str, Any]], title: str) -> None:
    """A table, one column a model and one row a figure; how much changed from `before` to `after`, with its interval."""
    after = None  # where there is room for its change
    if len(results) <= 4:
        after = next((r for r in results if r["model"] == "after" and r.get("change")), None)
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
        cells = []
        for result in results:
            cells.append(text_of(name, result["metrics"][name]).split(" ")[0] if name in result["metrics"] else "")
            if result is after:
                cells.append(text_of(name, after["change"][name], sign=True) if name in after["change"] else "")
        table.add_row(escape(title_of(name)), *cells)
    print_table(table)
