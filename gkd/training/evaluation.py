"""The evaluation inside training: `gkd.evaluation.evaluator` on the models as training wraps and shards them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from secrets import token_hex

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, IterableDataset
from transformers import GenerationConfig, Trainer
from transformers.trainer_utils import EvalLoopOutput

from gkd.compat import run_inside_forward
from gkd.config.training import NEEDS_HELD_OUT
from gkd.data.batch import Batch, GKDCollator, Source, prompts_of, unpadded_rows
from gkd.data.encoding import RowEncoder, encode_dataset
from gkd.evaluation.evaluator import Candidate, Evaluation, answered, row_sums, terms
from gkd.generation.sampling import sampling_config, sampling_seed, writer_fingerprint
from gkd.models.loading import size_of
from gkd.training.faults import not_written, out_of_memory

_PROBE_ROWS = 128
NO_EVALUATION = (
    "An evaluation needs the teacher's distribution and text, and neither a teacher cache nor a server of text alone has both: "
    "gkd evaluate does it, with another teacher"
)


def held_out_rows(dataset: Dataset | IterableDataset, encoder: RowEncoder) -> Dataset:
    """Rows ready for evaluation; a stream is read to its end, since every rank needs all rows."""
    encoded = encode_dataset(dataset, encoder, keep_rows=True)
    return Dataset.from_list(list(encoded)) if isinstance(encoded, IterableDataset) else encoded


class HeldOutEvaluation:
    """Evaluates the trainer's student, and once its teacher, on held-out rows.

    Args:
        trainer: a `gkd.training.trainer.GKDTrainer`.
        data_name: of the rows, in results.
        teacher_name: in results.
    """

    def __init__(self, trainer: Trainer, data_name: str, teacher_name: str | None):
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator
        self.data_name, self.teacher_name = data_name, teacher_name
        self._evaluations: dict[str, Evaluation] = {}  # by the prefix of their metrics

    def run(self, dataset: Dataset, prefix: str) -> EvalLoopOutput:
        """Metrics to log, named with the prefix; `OUTPUT_DIR/evaluation` keeps them with their intervals.

        Raises:
            RunStopped: memory or disk ran out.
            ValueError: there is no teacher.
        """
        trainer = self.trainer
        if not trainer.teacher.writes:
            raise ValueError(f"{NO_EVALUATION}.")
        evaluation = self._evaluations.get(prefix)
        if evaluation is None or evaluation.dataset is not dataset:
            evaluation = self._evaluations[prefix] = self._new(dataset, prefix)
        try:
            with evaluating(trainer, "evaluating", then="training" if trainer.is_in_train else None):
                figures = self._figures(evaluation)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, "evaluating", "") from error
        except OSError as error:
            if not trainer.is_in_train:
                raise
            raise not_written("The evaluation", error, self.args.output_dir) from error
        logs = {f"{prefix}_{name}": estimate["value"] for name, estimate in figures.items()}
        for source in (Source.DATASET, Source.TEACHER, Source.ON_POLICY):
            if f"{source.label}/loss" in figures:
                logs[f"{prefix}_loss"] = figures[f"{source.label}/loss"]["value"]
                break
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=logs, num_samples=len(evaluation.rows))

    def _figures(self, evaluation: Evaluation) -> dict:
        trainer, teacher = self.trainer, self.trainer.teacher
        with teacher.stay():
            if not evaluation.has_teacher:
                config = self._config(Source.TEACHER)
                identity = self._identity(None if teacher.sharded else teacher.identity(config))
                evaluation.teacher(Candidate("teacher", teacher.size, identity, partial(teacher.write, config=config)))
            step = trainer.state.global_step
            label = "before" if step == 0 else f"step {step}" if trainer.is_in_train else "after"
            if label == "after" and self.args.load_best_model_at_end:
                step = trainer.state.best_global_step or step
            config = self._config(Source.ON_POLICY)
            identity = self._identity(None if trainer.sharded else writer_fingerprint(trainer.model, config))
            write = partial(trainer.rollout.writer.write_student, config=config)
            size = size_of(trainer.model)
            score = partial(score_of, trainer)
            return evaluation.student(Candidate(label, size, identity, write, score, step))

    def _new(self, dataset: Dataset, prefix: str) -> Evaluation:
        return Evaluation(
            self.accelerator,
            self.trainer.processing_class,
            dataset,
            self.data_name + prefix.removeprefix("eval"),
            terms(self.args, self.teacher_name),
            self.trainer.pairing.stop_ids,
            self.args.metrics,
            self.args.scorer,
            self.args.per_device_eval_batch_size,
            self.trainer.objective.divergence,
            self.args.output_dir,
            lambda: self.trainer.generator.capture_seconds,
            self.trainer.teacher,
            seed=self.args.seed,
            sharded=self.trainer.teacher.sharded,  # also next to a sharded student
            show_progress=not self.args.disable_tqdm,
        )

    def _config(self, source: Source) -> GenerationConfig:
        pairing = self.trainer.pairing
        return sampling_config(pairing, pairing.sizes[source], self.args.max_new_tokens, self.args.eval_temperature)

    def _identity(self, fingerprint: bytes | None) -> str:
        """Sharded weights have no fingerprint: their identity is random, so they are evaluated anew."""
        if fingerprint is None:
            return broadcast_object_list([token_hex(16)])[0]
        return f"{fingerprint.hex()} {self.accelerator.mixed_precision}"


class HeldOutProbe:
    """Measures the divergence that `gkd.rollout.lmbda.AutoLambda` compares, on some of the trainer's held-out rows.

    Args:
        trainer: a `gkd.training.trainer.GKDTrainer` with `eval_dataset`; of several the first counts.

    Raises:
        ValueError: less than two rows, whose differences would have no error.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.accelerator = trainer, trainer.accelerator
        held_out = trainer.eval_dataset
        held_out = next(iter(held_out.values())) if isinstance(held_out, dict) else held_out
        if len(held_out) < 2:
            raise ValueError(f"--lmbda auto {NEEDS_HELD_OUT}, and one is too few.")
        at = np.linspace(0, len(held_out) - 1, min(len(held_out), _PROBE_ROWS)).astype(int)  # they may be in order
        self.rows = held_out.select(at).to_list()
        self.collate = GKDCollator(trainer.processing_class.pad_token_id, trainer.teacher.columns)
        self.config = trainer.generation_configs[Source.ON_POLICY]
        settings = [[row["prompt_ids"] for row in self.rows], self.config.max_new_tokens, self.config.temperature]
        self.identity = sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def __call__(self) -> list[float]:
        """KL(student‖teacher) in nats a token on a completion of each row, which the student writes now. Collective."""
        size = self.trainer.args.per_device_eval_batch_size
        with evaluating(self.trainer, "probing", then="generating"), self.trainer.teacher.stay():
            completions = self._by_rank(self._write, self.rows, -(-len(self.rows) // self.accelerator.num_processes))
            pairs = zip(self.rows, completions, strict=True)
            return self._by_rank(self._measure, [answered(row, completion) for row, completion in pairs], size)

    def _write(self, rows: list[dict], first: int) -> list[list[int]]:
        batch = self.collate(rows)
        prompts, mask = (tensor.to(self.accelerator.device) for tensor in prompts_of(batch))
        seed = sampling_seed(self.trainer.args.seed, first, 0, evaluation=True)  # the same each time: less noise
        return unpadded_rows(*self.trainer.rollout.writer.write_student(prompts, mask, self.config, seed))

    def _measure(self, rows: list[dict], _: int) -> list[float]:
        collated = self.collate(rows)
        text = Batch.of(collated)
        self.trainer.teacher.read(text, collated)
        sums = row_sums(text, partial(score_of, self.trainer), self.accelerator.device)
        return [row["reverse_kl"] / max(row.get("aligned", row["tokens"]), 1) for row in sums]

    def _by_rank(self, work: Callable[[list[dict], int], list], rows: list[dict], size: int) -> list:
        """What `work` gives for all rows, a batch of `size` at a time on each rank; it takes the first row's number too."""
        batches = [(rows[start : start + size], start) for start in range(0, len(rows), size)]
        ranks, sharded, results = (
            self.accelerator.num_processes,
            self.trainer.sharded or self.trainer.teacher.sharded,
            [],
        )
        for start in range(0, len(batches), ranks):
            index = start + self.accelerator.process_index
            values = []
            if index < len(batches) or sharded:  # sharded models run in step
                values = work(*batches[min(index, len(batches) - 1)])
            results += gather_object(values if index < len(batches) else [])
        return results


@contextmanager
def evaluating(trainer: Trainer, doing: str, then: str | None) -> Iterator[None]:
    """The student is in evaluation mode, and phase `then` is timed afterwards."""
    training = trainer.model.training
    trainer.model.eval()
    if callable(getattr(trainer.optimizer, "eval", None)):  # schedule-free optimizers keep two sets of weights
        trainer.optimizer.eval()
    try:
        with trainer.phases.apart(doing, then=then):
            yield
    finally:
        trainer.model.train(training)


def score_of(trainer: Trainer, batch: Batch) -> torch.Tensor:
    """The `EvaluationStatistics` (9, N) of the student on a batch's scored tokens."""
    measure = trainer.comparison.measure
    with torch.no_grad(), trainer.accelerator.autocast():
        if not trainer.sharded:  # DDP's forward would wait for ranks that have no batch left
            return measure(batch)
        return run_inside_forward(trainer.model_wrapped, trainer.model, measure, batch)
