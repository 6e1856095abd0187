"""From the records of an evaluation to averages with confidence intervals."""

import numpy as np

from gkd.data.batch import Source
from gkd.losses.objective import EvaluationStatistics
from gkd.metrics.names import Estimate
from gkd.metrics.tasks import TaskMetrics
from gkd.runs.results import Record

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
        sums_of_rows = [r.get(key, {}) if r.get(key, {}).get("by", label) == label else {} for r in records]
        tokens = np.array([m.get("tokens", 0.0) for m in sums_of_rows])
        if not tokens.any():
            continue
        for name in EvaluationStatistics._fields:
            sums = np.array([m.get(name, 0.0) for m in sums_of_rows])
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
