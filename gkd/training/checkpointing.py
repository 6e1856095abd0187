"""What keeps a run alive inside training: whole checkpoints, exact resumes, stops that were asked for, steps skipped."""

import json
import math
import os
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from gkd.compat import SFTTrainer
from gkd.data.batch import IGNORE, Batch
from gkd.io.errors import RunStopped, first_line, is_of_writing, why_not_written
from gkd.io.files import publish, put_aside, write_json, written_aside
from gkd.io.links import remove
from gkd.io.pickles import check_checkpoint
from gkd.rollout.steps import StepText, load_pending, save_pending
from gkd.runs.checkpoints import UNFINISHED, last_whole, move_into, rotate, seal, step_of
from gkd.runs.folder import run_id
from gkd.training.callbacks import StepEnd
from gkd.training.faults import NonfiniteSteps, StopOnSignal, ToHost, out_of_memory

logger = get_logger(__name__)
MICRO_BATCH = "micro_batch.json"

# A resumed run that changes one of these writes anew what was written ahead, or looks for the best figure anew.
_OF_TEXT = set("lmbda seq_kd temperature max_new_tokens steps_per_generation router_aux_loss_coef".split())
_OF_BEST = set(
    "metric_for_best_model greater_is_better eval_dataset_name dataset_test_split beta kd_ratio loss_temperature".split()
)
_HYPERPARAMETERS = ("weight_decay", "betas", "eps")  # in an optimizer's state, beside the learning rate
_SCALER_SEARCH = 40  # how often fp16's GradScaler may halve its scale before it fits


class Survives:
    """The part of `gkd.training.trainer.GKDTrainer` that outlives kills, full disks, bad steps and short memory."""

    def _init_survival(self) -> None:
        self.stop: StopOnSignal | None = None  # set by whoever catches signals
        self.stopped = False  # training ended early because it was asked to
        self.skipped_summary: str | None = None  # at the end of a training, of steps that were not finite
        self._stop_agreed: ToHost | None = None
        self._pending: dict[int, StepText] = {}  # text from a checkpoint, by its step
        self._doing = "training"
        self._step_batches: list[Batch] = []
        self._step_losses: list[torch.Tensor] = []
        self._sums_before: tuple[torch.Tensor, ...] = ()
        path = Path(self.args.output_dir, f"_skipped_steps-{self.args.process_index}.jsonl")
        limit = self.args.max_skipped_steps
        limit = limit if not self.args.fp16 else max(limit, _SCALER_SEARCH)
        self.skipped = NonfiniteSteps(limit, self._rows_of, path, self._bad_weight)
        # Finite losses of skipped steps: since the last log, and before it.
        self._skipped_loss = torch.zeros((), device=self.args.device)
        self._skipped_losses = 0.0
        self._aside: Path | None = None
        self._micro_rows = self._known_micro_rows()
        self._changed: set[str] = set()  # flags that differ from those of the checkpoint
        self._asked_for: list[dict[str, float]] = []  # hyperparameters of the optimizer's groups, as the flags say
        self.add_callback(StepEnd(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, changed: Iterable[str] = (), **kwargs):
        """transformers' own. A checkpoint of another folder brings the text along that its teacher has written.

        What the flags say now applies from the checkpoint's step on: learning rate, schedule, weight decay, when to log,
        save and evaluate.

        Args:
            changed: names of the flags that had other values before the checkpoint, see `gkd.runs.resume`.

        Raises:
            gkd.io.errors.RunStopped: memory or disk ran out, or too many steps in a row were not finite.
            ValueError: True, and there is no whole checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint, problems = last_whole(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"No checkpoint in {self.args.output_dir} is whole. {' '.join(problems)}".strip())
        self._changed = set(changed)
        self._start_from(resume_from_checkpoint or None)
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            if not self.stopped:
                self.skipped_summary = self.skipped.summary(self.state.global_step)
            return output
        except torch.OutOfMemoryError as error:
            shape = "".join(
                f" of {batch.rows} rows x {batch.input_ids.shape[1]} tokens"
                for batch in self._step_batches[len(self._step_losses) :][:1]
                if not self._doing.startswith("generating")
            )
            raise out_of_memory(error, self._doing, shape) from error

    # ------------------------------------------------------------------ resume

    def _start_from(self, checkpoint: str | None) -> None:
        """The state beside transformers' own: the text that was written ahead, and what the cache held at that step."""
        step, run = 0, Path(self.args.output_dir)
        self._pending = {}
        if checkpoint is not None:
            check_checkpoint(checkpoint)
            run = Path(checkpoint).parent
            step = step_of(checkpoint)
            rank, ranks = self.args.process_index, self.args.world_size
            if not self._changed & _OF_TEXT:
                self._pending = load_pending(checkpoint, rank, ranks, self.accelerator.device)
        cache = self._writer.cache
        if cache is None:
            return
        main = self.is_world_process_zero()
        ids = [run_id(self.args.output_dir), run_id(run, make=False)] if main else [None, None]
        cache.run, there = broadcast_object_list(ids)
        for process in (main, self.accelerator.is_local_main_process and not main):  # machines may have a disk each
            if process:
                if checkpoint is not None and self.args.teacher_text_cache == "auto":
                    cache.take_from(run / cache.path.parent.name)
                cache.check()
                for known in {cache.run, there} - {None}:  # this folder's, of an attempt that left no checkpoint
                    cache.forget_since(step, known)
            self.accelerator.wait_for_everyone()
        if main and checkpoint is not None:
            cache.compare(Path(checkpoint))

    def _init_training_state(self, *args, **kwargs):
        start = super()._init_training_state(*args, **kwargs)
        # A checkpoint's state says when its run logged and saved.
        self.state.compute_steps(self.args, self.state.max_steps)
        if self._changed & _OF_BEST:
            self.state.best_metric = self.state.best_model_checkpoint = self.state.best_global_step = None
        return start

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        self._asked_for = [
            {name: group[name] for name in _HYPERPARAMETERS if name in group} for group in optimizer.param_groups
        ]
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """transformers' own, and then what the flags say now: a state holds the values of the run that saved it.

        The next step has the learning rate that the present schedule gives it; without a change that is the saved one, bit
        by bit.
        """
        scheduler = self.lr_scheduler
        kept = "lr_scheduler_type" not in self._changed  # else its state is of another kind
        groups = self.optimizer.param_groups
        rates = getattr(scheduler, "base_lrs", None) or [group["lr"] for group in groups]
        if checkpoint is not None and not kept:
            self.lr_scheduler = SimpleNamespace(load_state_dict=lambda state: None)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            self.lr_scheduler = scheduler
        if checkpoint is None:
            return
        groups = self.optimizer.param_groups  # others than before
        for group, asked in zip(groups, self._asked_for, strict=False):
            group |= asked
        if isinstance(scheduler, LambdaLR):
            if not kept:
                scheduler.last_epoch = self.state.global_step
            scheduler.base_lrs = list(rates)
            rates = [
                rate * share(scheduler.last_epoch) for rate, share in zip(rates, scheduler.lr_lambdas, strict=True)
            ]
        elif kept and "learning_rate" not in self._changed:  # on a plateau: as low as it has come
            return
        for group, base, rate in zip(groups, getattr(scheduler, "base_lrs", rates), rates, strict=True):
            group["initial_lr"], group["lr"] = base, rate
        scheduler._last_lr = list(rates)

    def _issue_warnings_after_load(self, load_result) -> None:
        """transformers' own, of a whole model's checkpoint; a tensor that it lacks would be that of the base.

        Raises:
            RunStopped: a tensor is missing that is no other name of one that is there.
        """
        state = self.model.state_dict()
        missing = sorted(set(load_result.missing_keys) & state.keys())
        there = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
        if lacking := [name for name in missing if state[name].data_ptr() not in there]:
            raise RunStopped(f"The checkpoint's weights lack {lacking[0]}: take another one.")
        super()._issue_warnings_after_load(load_result)

    # ------------------------------------------------------------------ checkpoints

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:  # else it has no final name yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        """transformers' own, written aside, sealed with checksums and renamed.

        Raises:
            RunStopped: it could not be written, or the weights are not finite; the ones before it are as they were.
        """
        self._raise_if_not_finite()
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        with self._written_aside(run, name) as aside:
            save_pending(
                aside / name,
                {self.state.global_step + i: p.text for i, p in enumerate(self._planned) if p.text is not None},
                self.args.process_index,
                self.args.world_size,
            )
            super()._save_checkpoint(model, trial)
            if self._writer.cache is not None and self.args.should_save:
                self._writer.cache.note(aside / name)
            # transformers has looked for the best one aside.
            best = f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step and (best == name or (run / best).is_dir()):
                self.state.best_model_checkpoint = str(run / best)
                if self.args.should_save:
                    self.state.save_to_json(str(aside / name / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            self._publish(aside / name, run / name)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))
        if self.args.should_save:
            rotate(run, self.args.save_total_limit, keep=[run / name, self.state.best_model_checkpoint or run / name])

    def _publish(self, aside: Path, final: Path) -> None:
        """Renames a folder that is written; on machines that share no disk, on each of them."""
        for process in (self.accelerator.is_main_process, self.accelerator.is_local_main_process):
            if process and aside.is_dir():
                seal(aside)
                if os.path.lexists(final):  # of a run that went back behind it
                    final.rename(aside.with_name(f"{final.name}-replaced"))
                publish(aside, final)
            self.accelerator.wait_for_everyone()

    @contextmanager
    def _written_aside(self, run: Path, what: str):
        """A folder for what is being written; all ranks enter it together."""
        aside = Path(run, UNFINISHED)
        try:
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                remove(aside)  # what a killed run left there
            self.accelerator.wait_for_everyone()
            aside.mkdir(parents=True, exist_ok=True)  # on each machine, whether they share a disk or not
            self._aside = aside
            yield aside
        except Exception as error:
            if not is_of_writing(error):
                raise
            raise RunStopped(
                f"{run / what} could not be written: {why_not_written(error)} {self._last_whole()}".strip()
            ) from error
        finally:
            self._aside = None
            if self.accelerator.is_local_main_process:
                remove(run / UNFINISHED)

    def _last_whole(self) -> str:
        """How to go on from the last whole checkpoint, if there is one."""
        good, _ = last_whole(self.args.output_dir)
        return f"{good} is whole: go on with it by --resume_from_checkpoint auto." if good else ""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers' own; no file has its final name before it is whole.

        As there, the main process may call it alone where each rank has all weights.

        Raises:
            RunStopped: it could not be written, or the weights are not finite.
        """
        if self._aside is not None:
            super().save_model(output_dir, _internal_call=True)
            return
        self._raise_if_not_finite()
        folder = Path(output_dir or self.args.output_dir)
        aside = folder / UNFINISHED
        try:
            if self.args.should_save:
                remove(aside)
            super().save_model(str(aside), _internal_call=True)
            if self.args.should_save:
                move_into(aside, folder)
        except Exception as error:
            if self.args.should_save:
                remove(aside)
            if not is_of_writing(error):
                raise
            raise RunStopped(
                f"The model in {folder} could not be written: {why_not_written(error)} Go on by "
                "--resume_from_checkpoint auto."
            ) from error
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_state(self) -> None:
        """transformers' own, written aside and renamed."""
        if self.args.should_save:
            with written_aside(Path(self.args.output_dir, "trainer_state.json")) as temporary:
                self.state.save_to_json(str(temporary))

    def _determine_best_metric(self, *args, **kwargs) -> bool:
        # With save_strategy="best" the answer decides whether to save, which a stop does in any case.
        return super()._determine_best_metric(*args, **kwargs) or self.stopped

    def _load_best_model(self) -> None:
        """transformers' own. The state of a checkpoint names the folder, which may be any, and hold pickles."""
        try:
            check_checkpoint(self.state.best_model_checkpoint)
        except ValueError as error:
            raise RunStopped(str(error)) from error
        super()._load_best_model()

    def _finalize_training(self, *args, **kwargs):
        best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
        if self.stopped:  # not the end: no best model to load, and no checkpoint to delete beside it
            self.state.best_model_checkpoint = None
        self.args.save_total_limit = None  # transformers would delete whatever is named like a checkpoint
        try:
            result = super()._finalize_training(*args, **kwargs)
        finally:
            self.state.best_model_checkpoint, self.args.save_total_limit = best, limit
        if limit == 1 and best is not None and not self.stopped and self.args.should_save:
            rotate(self.args.output_dir, limit, keep=[best])
        return result

    # ------------------------------------------------------------------ signals

    def stop_was_asked(self) -> bool:
        """Whether to stop at the end of this step, which all ranks find alike."""
        if self.accelerator.num_processes > 1:  # whoever was signalled said so when the step's tokens were counted
            asked = self._stop_agreed is not None and bool(self._stop_agreed.read()[0] > 0)
        else:
            asked = self._signalled
        self.stopped |= asked
        return asked

    @property
    def _signalled(self) -> bool:
        return self.stop is not None and self.stop.number is not None

    def _count_tokens(self, tokens: int, device: torch.device) -> torch.Tensor:
        """The scored tokens of all ranks; a signal that one of them got travels along, so that it costs no wait."""
        counts = torch.tensor([tokens, int(self._signalled)], device=device)
        counts = self.accelerator.reduce(counts, reduction="sum")
        if self.accelerator.num_processes > 1:
            self._stop_agreed = ToHost(counts[1:])
        return counts[0]

    # ------------------------------------------------------------------ steps that are not finite

    def _begin_step(self, batches: list[Batch]) -> None:
        self._step_batches, self._step_losses = batches, []
        if self.args.auto_micro_batch:
            self._sums_before = self._source_metrics.state()

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._doing = "the optimizer's step"
        rows = [{name: batch[name] for name in ("input_ids", "labels")} for batch in self._step_batches]
        bad = self._skip_if_bad(norm)
        self.skipped.add(self.state.global_step + 1, bad, rows, self._step_losses)
        finite = sum(torch.where(loss.isfinite(), loss, 0.0) for loss in self._step_losses)
        self._skipped_loss += torch.where(bad.to(self._skipped_loss.device), finite, 0.0)
        return norm

    def _tell_skipped(self, logs: dict[str, float]) -> None:
        """Counts skipped steps in a log, whose losses then average the other steps: NaN where there is none."""
        steps, skipped = self.skipped.since_last()
        lost = float(self.accelerator.reduce(self._skipped_loss, reduction="mean")) if skipped else 0.0
        self._skipped_loss.zero_()
        self._skipped_losses += lost
        if skipped and "loss" in logs:
            logs["loss"] = (logs["loss"] * steps - lost) / (steps - skipped) if steps > skipped else math.nan
        steps, skipped = self.skipped.steps, self.skipped.here
        if skipped and "train_loss" in logs:
            total = logs["train_loss"] * steps - self._skipped_losses
            logs["train_loss"] = total / (steps - skipped) if steps > skipped else math.nan
        if self.skipped.total:
            logs["skipped_steps"] = self.skipped.total

    @torch.no_grad()
    def _bad_weight(self) -> str | None:
        """The name of a trainable weight that holds a NaN or an infinity. Collective where weights are sharded.

        One kernel for all weights, and one wait. Of ZeRO-3 it sees what is gathered at this moment: the partitions that
        DeepSpeed keeps end in memory that nobody has written.
        """
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        trained = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in trained.items()}
        trained = {name: p for name, p in trained.items() if p.numel()}
        bad = ~get_total_norm(list(trained.values()), math.inf).isfinite()
        if self._sharded:
            bad = self.accelerator.reduce(bad.float().to(self.args.device), reduction="sum") > 0
        if not bool(bad):
            return None
        return next((name for name, p in trained.items() if not bool(p.isfinite().all())), "on another rank")

    def _raise_if_not_finite(self) -> None:
        if (weight := self._bad_weight()) is not None:
            raise RunStopped(
                f"The student's weights are not finite after step {self.state.global_step} ({weight}), so they are not "
                f"saved. Lower --learning_rate. {self._last_whole()}".strip()
            )

    def _skip_if_bad(self, norm: torch.Tensor | float) -> torch.Tensor:
        """Lets the optimizer's next step change nothing if the gradient is not finite; a scalar, whether so."""
        if self.is_deepspeed_enabled:  # has stepped already, and skips such steps by itself
            bad = getattr(self.optimizer, "step_was_skipped", False) or not math.isfinite(norm)
            return torch.tensor(bad)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
        bad = ~norm.isfinite()
        if self.accelerator.scaler is not None:  # fp16: GradScaler looks and skips
            return bad
        optimizer = self.optimizer.optimizer
        if getattr(optimizer, "_step_supports_amp_scaling", False) and not self._sharded:
            optimizer.found_inf = bad.float()  # GradScaler's protocol: the fused kernel itself skips, and nobody waits
        elif bool(bad):
            optimizer.zero_grad(set_to_none=True)  # a parameter without a gradient stays as it is
        return bad

    def _rows_of(self, batch: dict[str, torch.Tensor]) -> list[dict[str, str]]:
        rows = []
        for ids, labels in zip(batch["input_ids"].cpu(), batch["labels"].cpu(), strict=True):
            scored = (labels != IGNORE).nonzero()[:, 0]
            start = int(scored[0]) if len(scored) else len(ids)
            prompt = self.processing_class.decode(ids[:start])
            rows.append(
                {"prompt": prompt, "completion": self.processing_class.decode(ids[start:][labels[start:] >= 0])}
            )
        return rows

    # ------------------------------------------------------------------ memory

    def _known_micro_rows(self) -> int | None:
        """What --auto_micro_batch found earlier in this folder."""
        path = Path(self.args.output_dir, MICRO_BATCH)
        if not self.args.auto_micro_batch or not path.is_file():
            return None
        try:
            return int(json.loads(path.read_text(encoding="utf-8"))["rows"])
        except (ValueError, KeyError, TypeError) as error:
            put_aside(path, first_line(error), "What fits in memory is found again.")
            return None

    def training_step(self, model, inputs, num_items_in_batch=None):
        failure = None
        try:
            loss = self._in_pieces(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError as error:
            if not self.args.auto_micro_batch or self._rows_at_a_time(inputs) == 1:
                raise
            failure = first_line(error)
        if failure is not None:  # outside of the handler, whose traceback holds the tensors
            self._halve(inputs, failure)
            model.zero_grad()
            self._source_metrics.restore(self._sums_before)
            done, self._step_losses = len(self._step_losses), []
            for batch in self._step_batches[:done]:
                self.training_step(model, batch, num_items_in_batch)
            return self.training_step(model, inputs, num_items_in_batch)
        self._step_losses.append(loss)
        return torch.where(loss.isfinite(), loss, 0.0)  # the log averages what was learned from

    def _rows_at_a_time(self, inputs: Batch) -> int:
        return min(inputs.rows, self._micro_rows or inputs.rows)

    def _in_pieces(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        """A micro-batch's forward and backward, a few rows at a time if memory was too short for all of them."""
        rows = self._rows_at_a_time(inputs)
        pieces = [inputs] if rows == inputs.rows else list(inputs.pieces(rows))
        losses = []
        for i, piece in enumerate(pieces):
            with self._unsynchronized(model) if i < len(pieces) - 1 else nullcontext():
                losses.append(SFTTrainer.training_step(self, model, piece, num_items_in_batch))
        return losses[0] if len(losses) == 1 else sum(losses)

    @contextmanager
    def _unsynchronized(self, model):
        """Gradients stay on their rank: they travel with the last piece."""
        state = self.accelerator.gradient_state
        kept = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(kept)

    def _halve(self, inputs: Batch, failure: str) -> None:
        """Smaller micro-batches from here on, in the same global batch; several processes must start anew for it.

        Raises:
            RunStopped: the other ranks wait in the middle of this step, which can't be taken back.
        """
        rows = self._rows_at_a_time(inputs)
        self._micro_rows = -(-rows // 2)
        path = Path(self.args.output_dir, MICRO_BATCH)
        write_json(path, {"rows": self._micro_rows})
        told = f"Out of memory in {self._doing} with {rows} rows at a time ({failure})"
        if self.accelerator.num_processes > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise RunStopped(
                f"{told}. {path} now says {self._micro_rows}: start again with --resume_from_checkpoint auto, which "
                "takes the same global batch in smaller pieces."
            )
        logger.warning(f"{told}: micro-batches go on in pieces of {self._micro_rows}; the global batch is the same.")
        clear_device_cache(garbage_collection=True)
