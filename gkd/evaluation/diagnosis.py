"""Whether on-policy training will pay: how a student fares on its own text, and whether its teacher can still help there.

On its own text a student meets its own mistakes, which given text never shows. Training on it pays if the teacher, who
has to say what comes next, still finds the way from behind such a mistake. So the teacher continues the student's
answers from there, and a verifier judges what comes out; without a verifier, the teacher's surprise at the student's own
continuation tells less. The divergence on own text beside that on given text is the exposure bias of arXiv 2306.13649.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from gkd.data.batch import Batch, GKDCollator, by_shares, prompts_of, unpadded_rows
from gkd.evaluation.evaluator import Candidate, Evaluation, Write, answered
from gkd.generation.sampling import sampling_seed
from gkd.losses.objective import EvaluationStatistics
from gkd.metrics.tasks import TaskMetrics
from gkd.runs.results import Record

# An error is a token that surprises the teacher by at least so many nats above its entropy there (it gave the token a
# twentieth of the probability that it expects of one), and by more than anything in four of five answers of its own.
ERROR, OF_ITS_OWN = 3.0, 80
BEHIND = 32  # tokens behind an error in which the teacher's surprise may fall back
PASS = 1.0  # the score from which an answer has passed
_EDGES = (0, 8, 32, 128, 512, 2048)  # of the positions in an answer that are shown together
_SHOWN = {
    "loss": "total_variation",
    "forward_kl": "forward_kl",
    "agreement": "agreement",
    "top5_agreement": "top5_agreement",
}
_FIELD = {name: i for i, name in enumerate(EvaluationStatistics._fields)}
_COMPARED = [_FIELD[name] for name in _SHOWN]  # nan where a teacher with another tokenizer is not compared with


@dataclass
class Rescue:
    """What became of one failed answer when the teacher continued it: right behind the first error, and right before.

    `error` is the index of the erroneous token in the answer, `text` the answer as continued behind it.
    """

    row: int
    error: int
    text: str
    score: float
    score_before: float


def excess(statistics: np.ndarray) -> np.ndarray:
    """The teacher's surprise at each token of an answer, above its entropy there; in nats, (T,), from (9, T).

    A teacher with another tokenizer is surprised by a whole span, at its first token, and its entropy is that of the classes."""
    return statistics[_FIELD["teacher_nll"]] - statistics[_FIELD["teacher_entropy"]]


def error_level(teacher: Sequence[np.ndarray]) -> float:
    """From which excess surprise on a token is an error, in nats, by the teacher's own answers, (9, T) of each."""
    highest = [excess(row).max() for row in teacher if row.shape[1]]
    return max(ERROR, float(np.percentile(highest, OF_ITS_OWN))) if highest else ERROR


def first_error(surprise: np.ndarray, level: float) -> int | None:
    """The first token whose excess surprise (T,) reaches the level."""
    errors = np.flatnonzero(surprise >= level)
    return int(errors[0]) if len(errors) else None


def wilson(successes: float, trials: int) -> dict[str, float | None]:
    """A share with its 95 % score interval (Wilson 1927); None of nothing."""
    if not trials:
        return {"value": None, "low": 0.0, "high": 1.0}
    z, share = 1.96, successes / trials
    center, spread = (
        share + z * z / (2 * trials),
        z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2),
    )
    whole = 1 + z * z / trials
    return {"value": share, "low": max(0.0, (center - spread) / whole), "high": min(1.0, (center + spread) / whole)}


def by_position(rows: Sequence[np.ndarray]) -> list[dict[str, float]]:
    """Averages over the tokens at the same positions in their answers: `rows` has (9, T) of each."""
    spans = []
    for start, end in zip(_EDGES, (*_EDGES[1:], None), strict=True):
        parts = np.concatenate([row[:, start:end] for row in rows], axis=1)
        parts = parts[:, ~np.isnan(parts[_COMPARED[0]])]
        if parts.shape[1]:
            means = {name: float(parts[_FIELD[field]].mean()) for field, name in _SHOWN.items()}
            spans.append({"from": start + 1, "to": end, "tokens": parts.shape[1], **means})
    return spans


def errors(own: Sequence[np.ndarray], teacher: Sequence[np.ndarray]) -> dict[str, Any]:
    """Errors in the student's text, by the teacher's surprise; see `error_level`.

    `falls_back`: the share of errors behind which the teacher is, over the next `BEHIND` tokens, on average no more
    than half a nat more surprised than it expects. Rows are (9, T), the last token of an answer that ends included.
    """
    level = error_level(teacher)
    surprises = [excess(row) for row in own]
    found = [(surprise, at) for surprise in surprises if (at := first_error(surprise, level)) is not None]
    followed = [surprise[at + 1 : at + 1 + BEHIND] for surprise, at in found if len(surprise) > at + 1]
    means = np.array([behind.mean() for behind in followed])
    before = np.concatenate([surprise[:at] for surprise, at in found] or [np.zeros(0)])
    return {
        "level": level,
        "answers": wilson(len(found), len(own)),
        "position": float(np.median([at + 1 for _, at in found])) if found else None,
        "surprise_before": float(before.mean()) if len(before) else None,
        "surprise_at": float(np.mean([surprise[at] for surprise, at in found])) if found else None,
        "surprise_behind": float(means.mean()) if len(means) else None,
        "falls_back": wilson(float((means <= 0.5).sum()), len(means)),
    }


class Diagnosis:
    """Measures one student against the teacher of an evaluation, both of which have written their answers.

    Args:
        evaluation: on the rows; its divergence is the total variation.
        teacher, student: in it.
        teacher_writer: for a number of new tokens, what the teacher writes with.
        max_new_tokens, max_length: of an answer, and with its prompt.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        teacher: Candidate,
        student: Candidate,
        teacher_writer: Callable[[int], Write],
        max_new_tokens: int,
        max_length: int | None,
    ):
        self.evaluation, self._score_batch, self._teacher_writer = evaluation, student.score, teacher_writer
        self._max_new_tokens, self._max_length = max_new_tokens, max_length or sys.maxsize
        self.answers = evaluation.records(teacher)
        self.completions = evaluation.records(student)

    def statistics(self) -> dict[str, list[np.ndarray]]:
        """The `EvaluationStatistics` of each row's scored tokens, (9, T): on given text, and as each model wrote it."""
        rows = self.evaluation.rows
        own, teachers = (
            [answered(row, record["tokens"]) for row, record in zip(rows, records, strict=True)]
            for records in (self.completions, self.answers)
        )
        given = [self.evaluation.given(i) for i in range(len(rows))]
        return {"given": self._score(given), "own": self._score(own), "teacher": self._score(teachers)}

    def _score(self, rows: list[dict[str, Any]]) -> list[np.ndarray]:
        evaluation, device = self.evaluation, self.evaluation.accelerator.device
        collate = GKDCollator(evaluation.tokenizer.pad_token_id, evaluation.reader.columns)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
        scored: list[np.ndarray] = [np.zeros((len(_FIELD), 0))] * len(rows)
        for start in range(0, len(rows), evaluation.batch_size):
            indices = order[start : start + evaluation.batch_size]
            collated = collate([rows[i] for i in indices])
            batch = Batch.of(collated)
            evaluation.reader.read(batch, collated)
            values = self._score_batch(batch.to(device)).double().cpu().numpy()
            if batch.aligned is not None:
                values[np.ix_(_COMPARED, ~batch.aligned.cpu().numpy())] = np.nan
            row_of_token = (batch.scored // batch.labels.shape[1]).cpu().numpy()
            for row, i in enumerate(indices):
                scored[i] = values[:, row_of_token == row]
        return scored

    def passes(self) -> str | None:
        """The metric that says which answers pass: the first whose scores are all 0 to 1, if any is 1; None otherwise."""
        for name in dict.fromkeys(name for record in self.answers for name in record["scores"]):
            scores = [r["scores"].get(name) for r in (*self.answers, *self.completions)]
            scores = [score for score in scores if score is not None]
            if scores and min(scores) >= 0 and max(scores) == PASS:
                return name
        return None

    def rescues(self, metric: str, statistics: dict[str, list[np.ndarray]]) -> list[Rescue]:
        """Has the teacher continue the answers that fail by `metric`.

        Where no token of one is an error, the most surprising one counts. An answer of a stop token alone can't be
        continued and is left out.
        """
        level = error_level(statistics["teacher"])
        cases = []  # row, index of the error, answer
        for record, row in zip(self.completions, statistics["own"], strict=True):
            score = record["scores"].get(metric)
            tokens = [token for token in record["tokens"] if token not in self.evaluation.stop_ids]
            if score is None or score >= PASS or not tokens:
                continue
            surprise = excess(row)[: len(tokens)]
            at = first_error(surprise, level)
            cases.append((record["row"], int(surprise.argmax()) if at is None else at, tokens))
        continued, before = (
            self._continued(
                [(row, tokens[: at + behind]) for row, at, tokens in cases], f"the teacher continues {where}"
            )
            for behind, where in ((1, "behind errors"), (0, "before them"))
        )
        task = TaskMetrics(self.evaluation.metrics, self.evaluation.scorer)

        def score(row: int, text: str) -> float:
            reference = self.completions[row]["reference"]
            return task.row_scores(row, text, reference, self.evaluation.raw[row])[metric] or 0.0

        return [
            Rescue(row, at, text, score(row, text), score(row, other))
            for (row, at, _), text, other in zip(cases, continued, before, strict=True)
        ]

    def _continued(self, prefixes: list[tuple[int, list[int]]], phase: str) -> list[str]:
        """The answers of rows, each with these tokens at its beginning, as the teacher ends them."""
        evaluation, device = self.evaluation, self.evaluation.accelerator.device
        collate = GKDCollator(evaluation.tokenizer.pad_token_id)
        texts = [""] * len(prefixes)
        order = sorted(range(len(prefixes)), key=lambda i: -len(prefixes[i][1]))  # alike in the room that is left
        with tqdm(total=len(prefixes), desc=phase, leave=False, disable=not evaluation.show_progress) as bar:
            for start in range(0, len(prefixes), evaluation.batch_size):
                indices = order[start : start + evaluation.batch_size]
                rows = [evaluation.rows[prefixes[i][0]] for i in indices]
                begun = (prefixes[i][1] for i in indices)
                begun_there = map(evaluation.reader.begun, begun)
                read = (row.get("teacher_prompt_ids", row["prompt_ids"]) for row in rows)
                asked = zip(rows, read, begun_there, strict=True)
                batch = collate([row | {"teacher_prompt_ids": prompt + begun} for row, prompt, begun in asked])
                prompts, mask = (tensor.to(device) for tensor in prompts_of(batch, teacher=True))
                room = self._max_new_tokens - min(len(prefixes[i][1]) for i in indices)
                longest = max(len(evaluation.rows[prefixes[i][0]]["prompt_ids"] + prefixes[i][1]) for i in indices)
                room = max(
                    1, min(room, self._max_length - longest)
                )  # of the student's text, whatever the teacher reads
                seed = sampling_seed(evaluation.seed, len(evaluation.rows) + indices[0], 0, evaluation=True)
                more = by_shares(batch.get("teacher_shares"))
                ids, kept = self._teacher_writer(room)(prompts, mask, seed=seed, **more)
                for i, new in zip(indices, unpadded_rows(ids, kept), strict=True):
                    answer = [*prefixes[i][1], *new][: self._max_new_tokens]
                    texts[i] = evaluation.tokenizer.decode(answer, skip_special_tokens=True).strip()
                bar.update(len(rows))
        return texts


def share_rescued(rescues: Sequence[Rescue]) -> dict[str, Any]:
    """`rate`: the share of failed answers that pass when the teacher continues behind the first error; `before`: when it
    continues in front of it."""
    behind, before = (sum(getattr(r, name) >= PASS for r in rescues) for name in ("score", "score_before"))
    share = wilson(behind, len(rescues))
    return {
        "rate": share.pop("value"),
        **share,
        "failed": len(rescues),
        "before": wilson(before, len(rescues)),
    }


def record_lengths(records: Sequence[Record]) -> dict[str, float]:
    """Tokens of answers: their mean, median and 99th percentile."""
    lengths = [len(record["tokens"]) for record in records]
    return {"mean": float(np.mean(lengths)), **{f"p{p}": float(np.percentile(lengths, p)) for p in (50, 99)}}
