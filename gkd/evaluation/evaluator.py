"""How good a model is on held-out rows: its divergence from the teacher on given and on its own text, and task metrics.

`eval_gkd.py` and the evaluation inside training both use this class. Measurements are kept by row, so figures have
confidence intervals, a killed evaluation continues where it stopped, and one rank and several give the same figures.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from gkd.data.batch import IGNORE, Batch, GKDCollator, by_shares, prompts_of, training_batch
from gkd.data.rows import answer_of, prompt_of
from gkd.evaluation.bootstrap import changes, rows_by_teacher, shown_by_teacher, summarize_records
from gkd.generation.sampling import sampling_seed
from gkd.io.files import naming
from gkd.io.secrets import public
from gkd.losses.divergences import Divergence
from gkd.losses.objective import EvaluationStatistics
from gkd.metrics.names import Estimate
from gkd.metrics.tasks import TaskMetrics, repetition
from gkd.runs import results
from gkd.runs.results import Record
from gkd.teachers.base import Teacher

# Writes completions (B, T) and their mask for left-padded prompts (B, P), their mask and `seed`, by that name.
Write = Callable[..., tuple[torch.Tensor, torch.Tensor]]

# The `EvaluationStatistics` (9, N) of a batch's scored tokens.
Score = Callable[[Batch], torch.Tensor]


def terms(args: Any, teacher: str) -> str:
    """Settings under which results are comparable: the teacher and its weights, and how text is written."""
    names = "adapter revision dtype load_in_4bit load_in_8bit model_init_kwargs".split()
    parts = [teacher, *(public(getattr(args, f"teacher_{name}")) for name in names)]
    return " ".join(str(part) for part in [*parts, args.max_new_tokens, args.eval_temperature])


_VERSION = 1  # of what a record holds


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass
class Candidate:
    """A model in an evaluation."""

    label: str  # its name in tables
    size: tuple[int, int]  # parameters and their bytes
    identity: str  # a fingerprint of its weights and of how it writes
    write: Write
    score: Score | None = None  # a teacher has none
    step: int | None = None
    path: str | None = None


@dataclass
class Evaluation:
    """Evaluates a teacher, then any number of students, on the same held-out rows."""

    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    dataset: Iterable[dict[str, Any]]  # encoded by `gkd.data.encoding.encode_dataset(..., keep_rows=True)`
    data: str  # the name of these rows
    against: str  # see `terms`
    stop_ids: list[int]
    metrics: list[str]  # this and `scorer`: see `gkd.metrics.tasks.TaskMetrics`
    scorer: str | None
    batch_size: int  # rows that are generated and scored together; with sampling, the figures depend on it
    divergence: Divergence
    output_dir: str | os.PathLike  # its folder `evaluation` gets `results.json` and the records of each row
    seconds_apart: Callable[[], float]  # seconds spent so far that are not generation (capturing CUDA graphs)
    reader: Teacher  # that students are compared with
    seed: int = 0
    sharded: bool = False  # the models are sharded over the ranks, which must run them in step
    show_progress: bool = True

    def __post_init__(self):
        self.rows = [dict(row) for row in self.dataset]
        self.raw = [json.loads(row["row"]) if row.get("row") else {} for row in self.rows]
        # The generalized JSD is recorded by β alone, so that results from before other divergences stay comparable.
        self._loss_entry = {"beta": self.divergence.settings.get("beta")}
        if self.divergence.name != "jsd":
            self._loss_entry |= {"divergence": repr(self.divergence)}
        *_, loss = self._loss_entry.values()
        self._settings = _digest(_VERSION, self.rows, loss, self.seed, self.stop_ids)
        # One kind of reference for all rows: the data's answers or, where no row has one, the teacher's.
        self._answered = any(answer_of(row) is not None for row in self.raw)
        self._answers: list[Record] | None = None
        self._teacher = ""

    @property
    def has_teacher(self) -> bool:
        return self._answers is not None

    def teacher(self, candidate: Candidate) -> None:
        """Writes the teacher's answers, which students are compared with; must be called first."""
        self._teacher = candidate.identity
        self._answers = self.records(candidate)
        self._summarize(candidate, self._answers)

    def student(self, candidate: Candidate) -> dict[str, Estimate]:
        """Writes a student's completions, and compares it with the teacher on them and on given text.

        Where rows have different teachers, figures of each one's rows have its name in front: `math/on_policy/reverse_kl`.
        """
        return self._summarize(candidate, self.records(candidate))

    def _records_path(self, candidate: Candidate) -> Path:
        name = _digest(self._settings, candidate.identity, self._teacher if candidate.score else None)
        return Path(self.output_dir, results.FOLDER, "rows", f"{name}.jsonl")

    def _summarize(self, candidate: Candidate, records: list[Record]) -> dict[str, Estimate]:
        """Adds averages to `results.json`, with the change against the model `before`; all ranks get the averages."""
        figures: dict[str, Estimate] = {}
        if self.accelerator.is_main_process:
            task = TaskMetrics(self.metrics, self.scorer)
            figures = summarize_records(records, task)
            # The first batch may have read weights from the disk, so not the mean.
            seconds = float(np.median([record["seconds"] for record in records]))
            entry = {
                "model": candidate.label,
                "step": candidate.step,
                "path": candidate.path,
                "data": self.data,
                "rows": len(records),
                **self._loss_entry,
                "references": "the data's answers" if self._answered else "the teacher's answers",
                "settings": _digest(self._settings, self.against),
                "records": self._records_path(candidate).name,
                "parameters": candidate.size[0],
                "gib": candidate.size[1] / 2**30,
                "tokens_per_second": float(np.mean([len(r["tokens"]) for r in records])) / max(seconds, 1e-9),
                "metrics": figures,
            }
            before = []
            if candidate.label not in ("before", "teacher"):
                before = results.records_of(self.output_dir, "before", self.data, entry["settings"])
                entry["change"] = changes(before, records)
            parts = {}
            if names := self.reader.names:
                groups = rows_by_teacher((row["teacher_shares"] for row in self.rows), names)
                parts = {n: self._part([records[row] for row in rows], before, task) for n, rows in groups.items()}
            if parts:
                entry["by_teacher"] = parts
            results.add_result(self.output_dir, entry)
            for label, part in parts.items():
                figures = figures | {f"{label}/{name}": figure for name, figure in part["metrics"].items()}
        return broadcast_object_list([figures])[0]

    def _part(self, records: list[Record], before: list[Record], task: TaskMetrics) -> dict[str, Any]:
        """What `results.json` has of one teacher's rows."""
        figures, change = summarize_records(records, task), changes(before, records)
        return {
            "rows": len(records),
            "metrics": {name: figures[name] for name in shown_by_teacher(figures)},
            "change": {name: change[name] for name in shown_by_teacher(change)},
        }

    def records(self, candidate: Candidate) -> list[Record]:
        """The records of all rows, on all ranks. Those that an earlier evaluation with the same settings wrote are reused."""
        path = self._records_path(candidate)
        main = self.accelerator.is_main_process
        (records,) = broadcast_object_list([results.read_records(path, repair=True) if main else []])
        records = [record for record in records if record["row"] in range(len(self.rows))]
        done = {record["row"] for record in records}
        # The longest first: a batch holds prompts of similar length, and one that does not fit in memory fails at once.
        order = sorted(range(len(self.rows)), key=lambda i: (-len(self.rows[i]["prompt_ids"]), i))
        pending = [i for i in order if i not in done]
        batches = [pending[i : i + self.batch_size] for i in range(0, len(pending), self.batch_size)]
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        if main:
            path.parent.mkdir(parents=True, exist_ok=True)
        shown = {"desc": f"evaluating ({candidate.label})", "disable": not (main and self.show_progress)}
        with tqdm(total=len(self.rows), initial=len(done), leave=False, **shown) as bar:
            for start in range(0, len(batches), ranks):
                index = start + rank
                measured = []
                if index < len(batches) or self.sharded:
                    measured = self.measure(batches[min(index, len(batches) - 1)], candidate)
                measured = gather_object(measured if index < len(batches) else [])
                if main:
                    with naming(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in measured)
                records += measured
                bar.update(len(measured))
        records.sort(key=lambda record: record["row"])
        # Scores are always computed again: they cost little, and --metrics may have changed.
        (scores,) = broadcast_object_list([self._scores(records, candidate.label) if main else []])
        for record, values in zip(records, scores, strict=True):
            record["scores"] = values
        if main:
            results.write_records(path, records)
        return records

    def _scores(self, records: list[Record], label: str) -> list[dict[str, float | None]]:
        task = TaskMetrics(self.metrics, self.scorer)
        scores = [task.row_scores(r["row"], r["text"], r["reference"], self.raw[r["row"]]) for r in records]
        for problem in task.problems:
            tqdm.write(f"warning: {label}: {problem}", file=sys.stderr)
        return scores

    def measure(self, indices: list[int], candidate: Candidate) -> list[Record]:
        device, pad = self.accelerator.device, self.tokenizer.pad_token_id
        collate = GKDCollator(pad, self.reader.columns)
        batch = collate([self.rows[i] for i in indices])
        prompts, mask = (tensor.to(device) for tensor in prompts_of(batch, teacher=candidate.score is None))
        started, apart = time.perf_counter(), self.seconds_apart()
        more = by_shares(batch.get("teacher_shares")) if candidate.score is None else {}
        seed = sampling_seed(self.seed, indices[0], 0, evaluation=True)
        ids, ids_mask = candidate.write(prompts, mask, seed=seed, **more)
        completions = [row[keep].tolist() for row, keep in zip(ids.cpu(), ids_mask.cpu().bool(), strict=True)]
        seconds = time.perf_counter() - started - (self.seconds_apart() - apart)
        records = []
        for i, tokens in zip(indices, completions, strict=True):
            text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            reference, by = answer_of(self.raw[i]), "dataset"
            if not self._answered and candidate.score is not None:
                reference, by = self._answers[i]["text"], "teacher"
            records.append(
                {
                    "row": i,
                    "prompt": prompt_of(self.raw[i]) or self.tokenizer.decode(self.rows[i]["prompt_ids"]),
                    "text": text,
                    "tokens": tokens,
                    "truncated": not any(token in self.stop_ids for token in tokens),
                    "repetition": repetition(tokens),
                    "seconds": seconds / len(indices),
                    "reference": reference,
                    "reference_by": by if reference is not None else None,
                }
            )
        if candidate.score is None:
            return records
        given = [self.given(i) for i in indices]
        collated = collate(given)
        own = training_batch(prompts, mask, ids, ids_mask, pad)
        for name, text, columns in (("given", Batch.of(collated), collated), ("own", own, batch)):
            self.reader.read(text, columns)
            sums, more = row_sums(text, candidate.score, device), self.reader.text_sums(text)
            for record, of_row, others in zip(records, sums, more, strict=True):
                record[name] = of_row | others
        for record, row in zip(records, given, strict=True):
            record["given"]["by"] = row["by"]
        return records

    def given(self, i: int) -> dict[str, Any]:
        """The given text of a row: the dataset's answer where there is one, else the teacher's."""
        row = self.rows[i]
        if any(label != IGNORE for label in row["labels"]):
            return row | {"by": "dataset"}
        return answered(row, self._answers[i]["tokens"]) | {"by": "teacher"}


def answered(row: dict[str, Any], answer: list[int]) -> dict[str, Any]:
    """An encoded row with these tokens in place of its answer."""
    prompt = row["prompt_ids"]
    return row | {"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer}


def row_sums(batch: Batch, score: Score, device: torch.device) -> list[dict[str, float]]:
    """For each row of a batch, the sums of its scored tokens' statistics, and the number of these tokens.

    With a teacher that has another tokenizer also `aligned`, how many of them are compared.
    """
    batch = batch.to(device)
    rows, width = batch.labels.shape
    statistics = score(batch).double().cpu().numpy()  # (9, N)
    row_of_token = (batch.scored // width).cpu().numpy()
    names = EvaluationStatistics._fields
    sums = {name: np.bincount(row_of_token, v, rows) for name, v in zip(names, statistics, strict=True)}
    sums["tokens"] = np.bincount(row_of_token, minlength=rows)
    if batch.aligned is not None:
        sums["aligned"] = np.bincount(row_of_token, batch.aligned.cpu().numpy(), rows)
    return [{name: float(values[i]) for name, values in sums.items()} for i in range(rows)]
