"""The evaluation inside training: the models as they are wrapped and sharded, handed to `gkd.evaluation.evaluator`."""

from functools import partial
from secrets import token_hex

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from gkd.compat import run_inside_forward
from gkd.config.values import check_room
from gkd.data.batch import Batch, Source
from gkd.data.encoding import encode_dataset
from gkd.evaluation.evaluator import Candidate, Evaluation, terms
from gkd.evaluation.statistics import evaluation_statistics
from gkd.generation.sampling import evaluation_config, writer_fingerprint
from gkd.io.errors import RunStopped, why_not_written
from gkd.training.faults import out_of_memory


class EvaluatesHeldOut:
    """The part of `gkd.training.trainer.GKDTrainer` that evaluates."""

    def held_out(self, dataset: Dataset | IterableDataset) -> Dataset:
        """Rows ready for evaluation; a stream is read to its end, since every rank needs to know all rows."""
        encoded = encode_dataset(dataset, self._encoder, keep_rows=True)
        return Dataset.from_list(list(encoded)) if isinstance(encoded, IterableDataset) else encoded

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """transformers' own; also takes raw rows."""
        check_room(self.args)
        if isinstance(eval_dataset, Dataset | IterableDataset):
            eval_dataset = self.held_out(eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """gkd.evaluation.evaluator on the dataloader's rows, in place of transformers' loop over its batches.

        The figures are logged with the prefix, and kept with their intervals in `OUTPUT_DIR/evaluation`.

        Raises:
            gkd.io.errors.RunStopped: memory or disk ran out.
        """
        if self.teacher_model is None:
            raise ValueError("An evaluation needs the teacher, and a teacher cache brings none: eval_gkd.py does it.")
        evaluation = self._evaluations.get(metric_key_prefix)
        if evaluation is None or evaluation.dataset is not dataloader.dataset:
            evaluation = self._evaluations[metric_key_prefix] = self._new_evaluation(
                dataloader.dataset, metric_key_prefix
            )
        training = self.model.training
        self.model.eval()
        if callable(getattr(self.optimizer, "eval", None)):  # schedule-free optimizers keep two sets of weights
            self.optimizer.eval()
        self._clock.enter(None)
        captured = self._capture_seconds()
        self._show_phase("evaluating")
        try:
            with self._teacher.stay():
                if not evaluation.has_teacher:
                    evaluation.teacher(self._candidate("teacher", self.teacher_model, Source.TEACHER))
                step = self.state.global_step
                label = "before" if step == 0 else f"step {step}" if self.is_in_train else "after"
                if label == "after" and self.args.load_best_model_at_end:
                    step = self.state.best_global_step or step
                student = self._candidate(label, self.model_wrapped, Source.ON_POLICY, step)
                figures = evaluation.student(student)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, "evaluating", "") from error
        except OSError as error:
            if not self.is_in_train:
                raise
            raise RunStopped(
                f"The evaluation could not be written: {why_not_written(error)} {self._last_whole()}".strip()
            ) from error
        finally:
            self.model.train(training)
            self._clock.enter("training" if self.is_in_train else None)
            # Graphs captured here are no part of the phases that a log tells.
            spent = zip(self._captured, captured, self._capture_seconds(), strict=True)
            self._captured = tuple(told + after - before for told, before, after in spent)
        logs = {f"{metric_key_prefix}_{name}": estimate["value"] for name, estimate in figures.items()}
        for source in (Source.DATASET, Source.TEACHER, Source.ON_POLICY):
            if f"{source.label}/loss" in figures:
                logs[f"{metric_key_prefix}_loss"] = figures[f"{source.label}/loss"]["value"]
                break
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=logs, num_samples=len(evaluation.rows))

    def _new_evaluation(self, dataset, prefix: str) -> Evaluation:
        return Evaluation(
            self.accelerator,
            self.processing_class,
            dataset,
            self.eval_data_name + prefix.removeprefix("eval"),
            terms(self.args, self._teacher_name),
            self.stop_ids,
            self.args.metrics,
            self.args.scorer,
            self.args.per_device_eval_batch_size,
            self.beta,
            self.args.output_dir,
            lambda: self._generator.capture_seconds,
            seed=self.args.seed,
            sharded=self._teacher.sharded,  # as it is beside a sharded student
            show_progress=not self.args.disable_tqdm,
        )

    def _candidate(self, label: str, model: nn.Module, source: Source, step: int | None = None) -> Candidate:
        config = evaluation_config(
            self.args.max_new_tokens,
            self.args.eval_temperature,
            self.processing_class.pad_token_id,
            self.stop_ids,
            self.generation_configs[source].suppress_tokens or (),
        )

        def write(prompts: torch.Tensor, mask: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
            return self._writer.write_as(source, config, prompts, mask, seed)

        unwrapped = self._unwrapped(model)
        sharded, own_base = self._sharded, False
        if source is Source.TEACHER:
            sharded, own_base = self._teacher.sharded, self.args.teacher_is_student
        if sharded:  # weights that are spread can't be told apart: never taken for known ones
            (identity,) = broadcast_object_list([token_hex(16)])
        else:
            identity = f"{writer_fingerprint(unwrapped, config, own_base).hex()} {self.accelerator.mixed_precision}"
        score = self._score_for_evaluation if source is Source.ON_POLICY else None
        return Candidate(label, unwrapped, identity, write, score, step)

    def _score_for_evaluation(self, batch: Batch) -> torch.Tensor:
        unwrapped = self._unwrapped(self.model_wrapped)
        with torch.no_grad(), self.accelerator.autocast():
            if not self._sharded:  # DDP would wait for ranks that have no batch left
                return self._evaluated(unwrapped, batch)
            return run_inside_forward(self.model_wrapped, unwrapped, self._evaluated, unwrapped, batch)

    def _evaluated(self, student, batch: Batch) -> torch.Tensor:
        """As `_summed_loss`, for evaluation: the `EvaluationStatistics` of each scored position, (9, N)."""
        measure = partial(evaluation_statistics, vocab_size=self.vocab_size, beta=self.beta)
        return self._at_scored(measure, student, batch)
