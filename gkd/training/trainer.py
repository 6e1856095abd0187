"""`GKDTrainer`: a subclass of TRL's with the same arguments, dataset columns and checkpoints.

An optimizer step runs these methods in this order:

    get_batch_samples   draws the source of the step's text, generates it for all micro-batches, counts the tokens
    training_step       once per step, on its micro-batches
    compute_loss        hidden states of teacher and student -> summed divergence over the global token count
    _get_grad_norm      a step that is not finite is skipped
    log                 the metrics of all steps since the last log, averaged over tokens and ranks

The work is done by its base `Checkpoints`, and by the trainer's parts: `teacher`, `objective` and their
`comparison`, `rollout` (gkd.rollout.planner), `stability` and `evaluation`.
"""

from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput

from gkd.compat import (
    GKDConfig,
    SFTTrainer,
    StockGKDTrainer,
    forward_kept,
    head_adapter_hidden,
    moe_config_kept,
    run_inside_forward,
)
from gkd.config.training import AUTO, NEEDS_HELD_OUT, GKDArguments
from gkd.config.values import check_room
from gkd.data.batch import Batch, GKDCollator, Source
from gkd.generation.vllm import EngineFailed
from gkd.losses.objective import Objective, divergence_of
from gkd.losses.targets import TextTarget
from gkd.models.heads import base_of
from gkd.models.pairing import Pairing
from gkd.rollout.steps import StepText
from gkd.runs.choices import Choices
from gkd.teachers.base import Teacher
from gkd.teachers.cache import TeacherCache
from gkd.training import setup
from gkd.training.callbacks import Completions, RunAway, StepEnd, show_progress
from gkd.training.checkpointing import Checkpoints
from gkd.training.evaluation import NO_EVALUATION, HeldOutEvaluation, held_out_rows
from gkd.training.faults import AgreedStop, StopOnSignal
from gkd.training.metrics import Phases, SourceMetrics
from gkd.training.stability import Stability
from gkd.training.student import Comparison, StudentForward

logger = get_logger(__name__)


class GKDTrainer(StockGKDTrainer):
    """Trains a student on its own text, the teacher's or the dataset's, towards the teacher's distribution.

    Takes the arguments of TRL's GKDTrainer; `args` may be a TRL GKDConfig. Datasets hold raw rows (see gkd.data.rows) or
    rows encoded by `gkd.data.encoding.encode_dataset`. Where the teacher is: see gkd.config.teacher.

    Args:
        teacher_model: a model, its name, or a `gkd.teachers.base.Teacher`, whose rows are the default `train_dataset`.
        teacher_processing_class: the teacher's tokenizer, needed if the two models' vocabularies differ in padding.
        teacher_cache: a `teacher_model` that is a cache.
        eval_data_name: of the held-out rows, in results.

    Raises:
        ValueError: no teacher; a cache of another student, or without what is asked of it; vocabularies that differ
            (`gkd.models.tokenizers.VocabularyMismatch`); a row that can't be used (`gkd.data.rows.DataError`); an architecture
            whose logits are not head(hidden states).
    """

    def __init__(
        self,
        model=None,
        teacher_model=None,
        args: GKDArguments | GKDConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        preprocess_logits_for_metrics=None,
        peft_config=None,
        formatting_func=None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        teacher_cache: TeacherCache | None = None,
        eval_data_name: str = "held out",
    ):
        # Arguments
        args = setup.settle_arguments(args)
        if eval_dataset is not None:
            check_room(args)
        elif args.lmbda == AUTO:
            raise ValueError(f"--lmbda auto {NEEDS_HELD_OUT}: pass eval_dataset=.")
        if teacher_cache is not None:
            if teacher_model is not None:
                raise ValueError("With teacher_cache= there is no teacher: no teacher_model=.")
            teacher_model = teacher_cache
        teacher_model = setup.described(teacher_model, args)
        if eval_dataset is not None and isinstance(teacher_model, Teacher) and not teacher_model.writes:
            raise ValueError(f"{NO_EVALUATION}: no eval_dataset=.")
        if compute_metrics is not None:
            logger.warning("compute_metrics is not called: no logits are kept. See --metrics and --scorer.")

        # Models and tokenizers
        model, teacher = setup.load_models(model, teacher_model, args, peft_config)
        self.pairing = Pairing.of_models(model, teacher, args, processing_class, teacher_processing_class)
        self.vocab_size = self.pairing.vocab_size
        self.text_server = setup.text_server(teacher, self.pairing, args)

        # Rows
        if train_dataset is None and isinstance(teacher, Teacher):
            train_dataset = teacher.rows(self.pairing)
        if data_collator is None:
            adding = [part for part in dict.fromkeys((teacher, self.text_server)) if isinstance(part, Teacher)]
            columns = partial(setup.columns_of, adding) if adding else None
            data_collator = GKDCollator(self.pairing.tokenizer.pad_token_id, columns)
            train_dataset, eval_dataset = setup.encode_rows(train_dataset, eval_dataset, teacher, self.pairing, args)

        # Not TRL's GKDTrainer.__init__ but that of its base SFTTrainer: we replace what it adds, the vocabulary check, the
        # dropout switch and the teacher's preparation.
        base = base_of(model)
        with head_adapter_hidden(base), moe_config_kept(base), forward_kept(args):
            SFTTrainer.__init__(
                self,
                model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=self.pairing.tokenizer,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                formatting_func=formatting_func,
            )
        # Our loss is a sum divided by the global token count of the step: accumulation must not divide it again.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True

        # Where student and teacher are
        self.teacher, self.sharded = setup.put_teacher(teacher, self)
        self.teacher_model = self.teacher.model
        self._draws_noise, self._evaluating = setup.settle_student(self)
        setup.compile_models(self.model, teacher, args)

        self._add_parts(args)
        self.evaluation = HeldOutEvaluation(self, eval_data_name, setup.name_of_teacher(teacher, args))
        setup.start_engines(self)

    def _add_parts(self, args: GKDArguments) -> None:
        self.lmbda, self.beta, self.temperature = args.lmbda, args.beta, args.temperature
        self.seq_kd = args.seq_kd and not self.teacher.brings_rows  # whose answers are its text
        self.generation_configs = setup.sampling_configs(self.pairing, args)
        self.choices = Choices(args.output_dir)
        self.generator = generator = setup.generator_of(self)
        progress = show_progress(self)
        self.student = student = StudentForward(
            self.model, self.accelerator, self._draws_noise, self.sharded, self.choices
        )

        def capture_seconds():
            return generator.capture_seconds, self.teacher.capture_seconds + student.seconds

        self.phases = Phases(capture_seconds, progress.show_phase)
        self.objective = Objective(divergence_of(self.args), self.vocab_size, self.args.loss_temperature)
        parts = self.objective, self.teacher, self.phases, student
        self.comparison = Comparison(*parts, self.sharded, self.aux_loss_enabled, args.compares)
        self.rollout = setup.rollout_of(self)
        self.step = StepText(Source.DATASET, [], 0, 0)  # the current one
        self.source_metrics = SourceMetrics(
            self.accelerator, self.teacher.unknown if args.compares else TextTarget.unknown
        )
        self.stability = Stability(self)
        self.stopping = AgreedStop(self.accelerator)
        self.checkpoints = Checkpoints(self)
        self.skipped_summary: str | None = None  # set at the end of a training
        self._completions: Completions | None = None
        if args.log_completions > 0:
            self._completions = Completions(args.log_completions, self.callback_handler)
            self.add_callback(self._completions)
        if args.student_writes:
            self.add_callback(RunAway())
        self.add_callback(StepEnd(self.stopping, lambda: self.rollout.lmbda.end(self.step.source)))

    # ------------------------------------------------------------------ TRL's names

    @property
    def generation_config(self) -> GenerationConfig:
        return self.generation_configs[Source.ON_POLICY]

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self.generation_configs[Source.ON_POLICY] = config

    @staticmethod
    def generalized_jsd_loss(student_logits, teacher_logits, *args, **kwargs):
        """TRL's function of whole logits, in fp32. Training uses gkd.losses.divergences instead."""
        return StockGKDTrainer.generalized_jsd_loss(student_logits.float(), teacher_logits.float(), *args, **kwargs)

    # ------------------------------------------------------------------ a training

    @property
    def stopped(self) -> bool:
        """A signal ended training early."""
        return self.stopping.stopped

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args,
        changed: Iterable[str] = (),
        stop: StopOnSignal | None = None,
        **kwargs,
    ):
        """transformers' own. From a checkpoint of another folder, the cache of its teacher's text is copied.

        From the checkpoint's step on the present flags apply: learning rate, schedule, weight decay, when to log, save and
        evaluate.

        Args:
            changed: names of the flags that had other values before the checkpoint, see `gkd.runs.resume`.
            stop: catches signals, after which training saves and stops.

        Raises:
            gkd.io.errors.RunStopped: memory or disk ran out, vLLM failed, or too many steps in a row were not finite.
            ValueError: `resume_from_checkpoint` is True and no checkpoint is whole.
        """
        checkpoint = self.checkpoints.begin(resume_from_checkpoint, changed)
        self.stopping.signal = stop
        try:
            output = super().train(checkpoint, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise self.stability.out_of_memory(error) from error
        except EngineFailed as error:
            raise self.checkpoints.keep_steps(error) from error
        if not self.stopped:
            self.skipped_summary = self.stability.summary()
        return output

    def get_train_dataloader(self):
        """transformers' own, called for each attempt to train. Batches stay on the CPU, where counting needs no sync."""
        self.rollout.restart()
        loader = super().get_train_dataloader()
        if isinstance(loader, DataLoaderShard):
            loader.device = None
        return loader

    # ------------------------------------------------------------------ a step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """An optimizer step's micro-batches with their text, and the number of scored tokens on all ranks.

        transformers restores a checkpoint's random state only after the first call of this method, so nothing here draws
        from the global random generators or changes their state.
        """
        self.phases.enter("generating")
        done, last = self.state.global_step, self.state.max_steps
        step, micro_batches = self.rollout.next_step(epoch_iterator, num_batches, done, last)
        self.phases.enter("training")
        if step is None:
            return [], None
        self.step = step
        self.source_metrics.add_completions(step)
        self.phases.show("training")
        if self._completions is not None and self.is_world_process_zero():
            self._completions.keep_step(step, self.state.global_step + 1, self.processing_class)
        self.stability.begin()
        tokens = self.stopping.count_tokens(sum(len(batch.scored) for batch in step.batches), device)
        # transformers counts micro-batches as the flags have them. All are trained on with the last, whatever they are.
        return [[] for _ in range(micro_batches - 1)] + [step.batches], tokens

    def _prepare_input(self, data):
        # Under DeepSpeed, transformers' own would cast the teacher's hidden states to the dtype of training.
        return data.to(self.args.device) if isinstance(data, Batch) else super()._prepare_input(data)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """SFTTrainer's on each batch of a list, in pieces if memory is short; TRL's GKDTrainer would generate again."""
        if not inputs:
            return torch.zeros((), device=self.args.device)
        # Under autocast, peft casts the bf16 input of each adapter to the adapter's fp32, and the linear layer casts it
        # back. Without dropout between the two, skipping both changes no bit.
        skips_casts = isinstance(self.model, PeftModel) and self.accelerator.native_amp and not self._draws_noise
        backward = partial(SFTTrainer.training_step, self, model, num_items_in_batch=num_items_in_batch)
        with disable_input_dtype_casting(self.model, active=skips_casts), self.student.step():
            return self.stability.train_on(backward, model, inputs if isinstance(inputs, list) else [Batch.of(inputs)])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The summed divergence of a micro-batch over `num_items_in_batch`, the step's tokens on all ranks.

        DDP, DeepSpeed and FSDP average gradients over ranks, so the sum is multiplied by their number: one rank with
        accumulation 4 and four ranks with accumulation 1 get the same loss and gradient.
        """
        batch = Batch.of(inputs)
        for module in self._evaluating:
            module.training = False
        with self.accelerator.autocast():
            # Cross-entropy on the student's own text would only confirm what it samples.
            kd_ratio = 1.0 if self.step.source is Source.ON_POLICY else self.args.kd_ratio
            loss_of = partial(self.comparison.loss, kd_ratio=kd_ratio)
            loss, sums, balance = run_inside_forward(model, self.model, loss_of, batch)
        tokens = len(batch.scored)
        aligned = batch.aligned if self.args.compares else None
        self.source_metrics.add_tokens(self.step.source, sums, tokens, aligned)
        if num_items_in_batch is None:
            loss = loss / max(tokens, 1)
        else:
            count = torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1)
            loss = loss * self.accelerator.num_processes / count
        if balance is not None:  # the step's is the mean over rows, and over ranks
            self.source_metrics.add_balance(balance, batch.rows)
            share = 1.0 if num_items_in_batch is None else batch.rows / self.step.rows
            loss = loss + self.args.router_aux_loss_coef * share * balance
        # An infinite loss becomes NaN, which makes the gradient NaN on all ranks: so all of them skip the step.
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        self.phases.at("the student's backward")
        if not return_outputs:
            return loss
        with torch.no_grad():  # the loss builds no logits, so outputs take another forward
            return loss, model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.stability.end(norm)
        return norm

    @cached_property
    def _parameters(self) -> int:
        return self.model.num_parameters(exclude_embeddings=True)

    def floating_point_ops(self, inputs) -> int:
        # transformers counts the parameters for each micro-batch.
        return 6 * sum(batch["input_ids"].numel() for batch in inputs) * self._parameters

    def _track_num_input_tokens(self, inputs) -> None:
        for batch in inputs:
            super()._track_num_input_tokens(batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:  # of training; its last log covers the steps since the one before
            metrics, tokens = self.source_metrics.flush()
            seconds, total = self.phases.flush()
            logs |= metrics | seconds
            if tokens:
                logs["tokens_per_second"] = tokens / total  # scored tokens of all ranks
            if torch.cuda.is_available():
                logs["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            logs |= self.rollout.figures(self.state.global_step, self.state.max_steps)
            self.stability.log(logs)
        super().log(logs, start_time)

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """transformers' own; also takes raw rows."""
        check_room(self.args)
        if isinstance(eval_dataset, Dataset | IterableDataset):
            eval_dataset = held_out_rows(eval_dataset, self.pairing.encoder)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """`HeldOutEvaluation` on the dataloader's rows, in place of transformers' loop over its batches."""
        return self.evaluation.run(dataloader.dataset, metric_key_prefix)

    # ------------------------------------------------------------------ checkpoints

    def _init_training_state(self, *args, **kwargs):
        start = super()._init_training_state(*args, **kwargs)
        self.checkpoints.apply_flags_to_state()
        self.stability.begin_training()
        return start

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        self.checkpoints.note_hyperparameters(optimizer)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.checkpoints.load_optimizer(super()._load_optimizer_and_scheduler, checkpoint)

    def _issue_warnings_after_load(self, load_result) -> None:
        self.checkpoints.check_loaded(load_result)
        super()._issue_warnings_after_load(load_result)

    def _get_output_dir(self, trial):
        return self.checkpoints.output_dir(super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.checkpoints.is_writing:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        write = partial(super()._save_checkpoint, model, trial)
        checkpoint = self.checkpoints.save(write, Path(self._get_output_dir(trial)))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        self.checkpoints.rotate(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers' own; no file has its final name before it is whole.

        Raises:
            gkd.io.errors.RunStopped: it could not be written, or the weights are not finite.
        """
        write = partial(super().save_model, _internal_call=True)
        if self.checkpoints.is_writing:
            write(output_dir)
            return
        self.checkpoints.save_model(write, Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_state(self) -> None:
        self.checkpoints.save_state()

    def _determine_best_metric(self, *args, **kwargs) -> bool:
        # With save_strategy="best" the result decides whether to save, and a stop always saves.
        return super()._determine_best_metric(*args, **kwargs) or self.stopped

    def _load_best_model(self) -> None:
        self.checkpoints.check_best()
        super()._load_best_model()

    def _finalize_training(self, *args, **kwargs):
        return self.checkpoints.finalize(partial(super()._finalize_training, *args, **kwargs))
