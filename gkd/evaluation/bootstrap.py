"""Averages of an evaluation's records, with confidence intervals by bootstrap over rows."""

from collections.abc import Iterable, Sequence

import numpy as np

from gkd.data.batch import Source
from gkd.losses.objective import EvaluationStatistics
from gkd.metrics.names import Estimate
from gkd.metrics.tasks import TaskMetrics
from gkd.runs.results import Record

_DRAWS = 1000  # bootstrap resamples
_PERPLEXITIES = {"student_nll": "student_perplexity", "teacher_nll": "teacher_perplexity"}
_BITS_PER_BYTE = ("student_bits_per_byte", "teacher_bits_per_byte")
# What is also shown of each teacher's rows, besides the task metrics.
_BY_TEACHER = ("forward_kl", "reverse_kl", "agreement")
_MOST_MIXTURES = 4  # that are told apart


def _figures(records: list[Record]) -> dict[str, np.ndarray]:
    """Each figure by name, (1 + draws,): of all rows, then of each bootstrap resample of them."""
    rows = len(records)
    # How often each resample draws each row, (draws, rows); the same for each model, so models pair up.
    weights = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), size=_DRAWS).astype(np.float32)
    figures: dict[str, np.ndarray] = {}

    def ratio(sums: np.ndarray, counts: np.ndarray, exponential: bool = False) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample may hold no row that counts
            ratios = [(times @ sums) / (times @ counts) for times in (np.ones((1, rows)), weights)]
        return np.concatenate([np.exp(part) if exponential else part for part in ratios])

    for source, key in ((Source.DATASET, "given"), (Source.TEACHER, "given"), (Source.ON_POLICY, "own")):
        label = source.label
        texts = [r.get(key, {}) if r.get(key, {}).get("by", label) == label else {} for r in records]
        tokens = np.array([text.get("tokens", 0.0) for text in texts])
        if not tokens.any():
            continue
        crossed = any("bytes" in text for text in texts)  # the teacher has another tokenizer
        compared = np.array([text.get("aligned", 0.0) for text in texts]) if crossed else tokens
        for name in EvaluationStatistics._fields:
            sums = np.array([text.get(name, 0.0) for text in texts])
            if not (crossed and name in _PERPLEXITIES):
                figures[f"{label}/{_PERPLEXITIES.get(name, name)}"] = ratio(sums, compared, name in _PERPLEXITIES)
        if crossed:
            figures[f"{label}/aligned"] = ratio(compared, tokens)
            size = np.array([text.get("bytes", 0.0) for text in texts])
            for name, of in zip(_BITS_PER_BYTE, _PERPLEXITIES, strict=True):
                bits = np.array([text.get(of, 0.0) for text in texts]) * (size > 0) / np.log(2)
                figures[f"{label}/{name}"] = ratio(bits, size)
    completions = {"completion_length": [float(len(r["tokens"])) for r in records]}
    completions |= {name: [float(r[name]) for r in records] for name in ("truncated", "repetition")}
    for name, values in completions.items():
        figures[f"{Source.ON_POLICY.label}/{name}"] = ratio(np.array(values), np.ones(rows))
    for name in dict.fromkeys(name for r in records for name in r["scores"]):
        scores = [r["scores"].get(name) for r in records]
        has_score = np.array([float(score is not None) for score in scores])
        if has_score.any():
            figures[f"score/{name}"] = ratio(np.array([score or 0.0 for score in scores]), has_score)
    return figures


def figures_ahead(answered: bool, unanswered: bool, scores: list[str], crossed: bool = False) -> list[str]:
    """The names in `summarize_records` of rows with an answer, of rows without, or both.

    Args:
        scores: the task metrics.
        crossed: the teacher has another tokenizer.
    """
    on_policy = Source.ON_POLICY.label
    texts = [Source.DATASET.label] * answered + [Source.TEACHER.label] * unanswered + [on_policy]
    of_text = [_PERPLEXITIES.get(name, name) for name in EvaluationStatistics._fields]
    if crossed:
        of_text = [name for name in of_text if name not in _PERPLEXITIES.values()] + ["aligned", *_BITS_PER_BYTE]
    names = [f"{text}/{name}" for text in texts for name in of_text]
    names += [f"{on_policy}/{name}" for name in ("completion_length", "truncated", "repetition")]
    return names + [f"score/{name}" for name in scores]


def rows_by_teacher(shares: Iterable[Sequence[float]], names: Sequence[str]) -> dict[str, list[int]]:
    """The numbers of the rows of each teacher, and of each mixture under a name such as `code 0.5 + math 0.5`.

    More than four mixtures count together, under `mixture`. {} where all rows have the same.

    Args:
        shares: of each of the `names` in a row, for each row.
    """
    groups: dict[str, list[int]] = {name: [] for name in names}
    for row, of_row in enumerate(shares):
        parts = {name: share for name, share in zip(names, of_row, strict=True) if share}
        label = (
            " + ".join(f"{name} {share:.2g}" for name, share in parts.items()) if len(parts) > 1 else next(iter(parts))
        )
        groups.setdefault(label, []).append(row)
    if len(mixtures := [label for label in groups if label not in names]) > _MOST_MIXTURES:
        groups["mixture"] = sorted(row for label in mixtures for row in groups.pop(label))
    groups = {label: rows for label, rows in groups.items() if rows}
    return groups if len(groups) > 1 else {}


def shown_by_teacher(figures: Iterable[str]) -> list[str]:
    """Of names of figures those that are also told for each teacher's rows."""
    return [name for name in figures if name.startswith("score/") or name.split("/")[1] in _BY_TEACHER]


def _estimate(figure: np.ndarray) -> Estimate:
    low, high = np.nanpercentile(figure[1:], [2.5, 97.5])
    return {"value": float(figure[0]), "low": float(low), "high": float(high)}


def summarize_records(records: list[Record], task: TaskMetrics) -> dict[str, Estimate]:
    """Averages by name, with 95 % intervals by bootstrap over rows.

    `dataset/`, `teacher/`: on text of the dataset or the teacher, averaged over its tokens; `on_policy/`: on the
    student's completions; `score/`: the task metrics, averaged over rows, or over the corpus as sacrebleu does.

    With a teacher that has another tokenizer, averages are over the tokens that are compared, and in place of perplexities
    there are bits per byte of text, over rows whose text both write.
    """
    figures = {name: _estimate(figure) for name, figure in _figures(records).items()}
    pairs = [(r["text"], r["reference"]) for r in records if r["reference"] is not None]
    corpus = task.corpus_scores([text for text, _ in pairs], [reference for _, reference in pairs])
    for name, (value, low, high) in corpus.items():
        figures[f"score/{name}"] = {"value": value, "low": low, "high": high}
    return figures


def changes(before: list[Record], after: list[Record]) -> dict[str, Estimate]:
    """after - before of each figure that both have, over the rows that both have, resampled in pairs."""
    before_by_row = {record["row"]: record for record in before}
    after = [record for record in after if record["row"] in before_by_row]
    if not after:
        return {}
    old, new = _figures([before_by_row[record["row"]] for record in after]), _figures(after)
    return {name: _estimate(figure - old[name]) for name, figure in new.items() if name in old}
