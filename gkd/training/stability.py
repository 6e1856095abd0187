"""Steps with gradients that are not finite are skipped; micro-batches that don't fit in memory are split."""

import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import Trainer

from gkd.data.batch import IGNORE, Batch
from gkd.io.errors import RunStopped, first_line
from gkd.io.files import write_whole
from gkd.runs.choices import MICRO_ROWS, NAME, SPARE_MEMORY
from gkd.training.faults import FlagOnHost, go_on_from, out_of_memory

_SCALER_SEARCH = 40  # steps that fp16's GradScaler may skip until its scale fits


@dataclass
class _Step:
    number: int
    bad: FlagOnHost
    rows: list[tuple[torch.Tensor, torch.Tensor]]  # ids and labels (B, L) of each micro-batch
    losses: list[torch.Tensor]


class Stability:
    """Skips steps that are not finite, stops a run with too many in a row, and splits micro-batches that don't fit.

    Whether a step was skipped is read one step late, at the same time on all ranks, to avoid a device sync.

    Args:
        trainer: a `gkd.training.trainer.GKDTrainer` with its `step`, `source_metrics`, `phases`, `choices` and `sharded`.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator
        self.metrics, self.phases, self.sharded = trainer.source_metrics, trainer.phases, trainer.sharded
        self._sums_before: tuple[torch.Tensor, ...] = ()
        self._path = Path(self.args.output_dir, f"_skipped_steps-{self.args.process_index}.jsonl")
        self._limit = max(self.args.max_skipped_steps, _SCALER_SEARCH if self.args.fp16 else 0)
        # Sums of the finite losses of skipped steps: since the last log, and before it.
        self._skipped_loss = torch.zeros((), device=self.args.device)
        self._skipped_losses = 0.0
        self.choices = trainer.choices
        self.begin_training()

    def begin_training(self) -> None:
        """Before a training, with the trainer's state: from a checkpoint, steps may have been skipped before it."""
        state = self.trainer.state
        logged = (log["skipped_steps"] for log in reversed(state.log_history) if "skipped_steps" in log)
        self._total = self._earlier = next(logged, 0) if state.global_step else 0
        self._steps = 0  # of this training, as far as they are settled
        self._reported = (0, 0)  # of its steps and skipped steps
        self._waiting: deque[_Step] = deque()
        self._in_a_row: list[_Step] = []

    def begin(self) -> None:
        """Before the trainer's next `step` trains."""
        self._sums_before = self.metrics.state()

    # ------------------------------------------------------------------ steps that are not finite

    def end(self, norm: torch.Tensor | float) -> None:
        """After a step's backward: has the optimizer skip the step if the gradient's norm is not finite.

        Raises:
            RunStopped: too many in a row were skipped.
        """
        self.phases.at("the optimizer's step")
        step = self.trainer.step
        bad = self._skip_if_bad(norm)
        rows = [(batch.input_ids, batch.labels) for batch in step.batches]
        self._waiting.append(_Step(self.trainer.state.global_step + 1, FlagOnHost(bad), rows, step.losses))
        self._settle(but=1)
        finite = sum(torch.where(loss.isfinite(), loss, 0.0) for loss in step.losses)
        self._skipped_loss += torch.where(bad.to(self._skipped_loss.device), finite, 0.0)

    def log(self, logs: dict[str, float]) -> None:
        """Adds the number of skipped steps; losses then average the other steps, NaN if there are none.

        Raises:
            RunStopped: too many in a row were skipped.
        """
        self._settle()
        before, self._reported = self._reported, (self._steps, self._total - self._earlier)
        steps, skipped = (now - then for now, then in zip(self._reported, before, strict=True))
        lost = float(self.accelerator.reduce(self._skipped_loss, reduction="mean")) if skipped else 0.0
        self._skipped_loss.zero_()
        self._skipped_losses += lost
        totals = {"loss": (lost, steps, skipped), "train_loss": (self._skipped_losses, *self._reported)}
        for name, (lost, steps, skipped) in totals.items():
            if skipped and name in logs:
                logs[name] = (logs[name] * steps - lost) / (steps - skipped) if steps > skipped else math.nan
        if self._total:
            logs["skipped_steps"] = self._total

    def summary(self) -> str | None:
        """A sentence on the skipped steps of a finished training; None if none was skipped.

        Raises:
            RunStopped: all steps were skipped.
        """
        step, last = self.trainer.state.global_step, len(self._in_a_row)
        if last:
            self._dump()
        if not self._total:
            return None
        where = f"Their rows are in {self._path}. Look at these rows, or lower --learning_rate."
        if self._total == step:
            raise RunStopped(
                f"All {step} optimizer steps had a NaN or infinite loss or gradient and were skipped: nothing was "
                f"trained. {where}"
            )
        text = f"{self._total} of {step} optimizer steps had a NaN or infinite loss or gradient and were skipped"
        if not last:
            return f"{text}."
        return f"{text}, the last {last} among them: the model is that of step {step - last}. {where}"

    @torch.no_grad()
    def bad_weight(self) -> str | None:
        """The name of a trainable weight with a NaN or an infinity. Collective if weights are sharded.

        One kernel and one device sync for all weights. Under ZeRO-3 it sees only weights that are gathered now: DeepSpeed's
        partitions end in padding that is never initialized.
        """
        trained = {name: p.detach() for name, p in self.trainer.model.named_parameters() if p.requires_grad}
        trained = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in trained.items()}
        trained = {name: p for name, p in trained.items() if p.numel()}
        bad = ~get_total_norm(list(trained.values()), math.inf).isfinite()
        if self.sharded:
            bad = self.accelerator.reduce(bad.float().to(self.args.device), reduction="sum") > 0
        if not bool(bad):
            return None
        return next((name for name, p in trained.items() if not bool(p.isfinite().all())), "on another rank")

    def refuse_bad_weights(self) -> None:
        """Raises RunStopped if the student's weights are not finite, before they are saved."""
        if (weight := self.bad_weight()) is not None:
            step = self.trainer.state.global_step
            raise RunStopped(
                f"The student's weights are not finite after step {step} ({weight}), so they are not saved. Lower "
                f"--learning_rate. {go_on_from(self.args.output_dir)}".strip()
            )

    def _skip_if_bad(self, norm: torch.Tensor | float) -> torch.Tensor:
        """Keeps the optimizer's next step from changing a weight if the gradient is not finite; a scalar, whether so."""
        if self.trainer.is_deepspeed_enabled:  # DeepSpeed has stepped already, and skips such steps by itself
            bad = getattr(self.trainer.optimizer, "step_was_skipped", False) or not math.isfinite(norm)
            return torch.tensor(bad)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
        bad = ~norm.isfinite()
        if self.accelerator.scaler is not None:  # fp16: GradScaler skips
            return bad
        optimizer = self.trainer.optimizer.optimizer
        if getattr(optimizer, "_step_supports_amp_scaling", False) and not self.sharded:
            optimizer.found_inf = bad.float()  # GradScaler's protocol: the fused kernel skips, without a sync
        elif bool(bad):
            optimizer.zero_grad(set_to_none=True)  # a parameter without a gradient is not updated
        return bad

    def _settle(self, but: int = 0) -> None:
        """Counts the waiting steps but the last `but`. Raises RunStopped if too many in a row were skipped."""
        while len(self._waiting) > but:
            step = self._waiting.popleft()
            self._steps += 1
            if not step.bad:
                self._in_a_row.clear()
                continue
            self._total += 1
            self._in_a_row.append(step)
            if len(self._in_a_row) < self._limit:
                continue
            self._dump()
            if (weight := self.bad_weight()) is not None:
                raise RunStopped(
                    f"The student's weights are not finite any more ({weight}): the loss of the last {self._limit} "
                    "optimizer steps was not either, nor can later ones be. Lower --learning_rate."
                )
            raise RunStopped(
                f"{self._limit} optimizer steps in a row had a NaN or infinite loss or gradient; none of them changed a "
                f"weight. Their rows are in {self._path}. Look at these rows, lower --learning_rate, or set "
                "--max_skipped_steps."
            )

    def _dump(self) -> None:
        """Writes the rows of the last skipped steps."""
        decode, lines = self.trainer.processing_class.decode, []
        for step in self._in_a_row:
            for (ids, labels), loss in zip(step.rows, step.losses, strict=True):
                for row, targets in zip(ids.cpu(), labels.cpu(), strict=True):
                    scored = (targets != IGNORE).nonzero()[:, 0]
                    start = int(scored[0]) if len(scored) else len(row)
                    completion = row[start:][targets[start:] >= 0]
                    entry = {"step": step.number, "loss_of_micro_batch": str(float(loss))}
                    entry |= {"prompt": decode(row[:start]), "completion": decode(completion)}
                    lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        write_whole(self._path, "".join(lines))

    # ------------------------------------------------------------------ memory

    def train_on(
        self, backward: Callable[[Batch], torch.Tensor], model: nn.Module, batches: list[Batch]
    ) -> torch.Tensor:
        """Forward and backward of a step's micro-batches, in pieces if one did not fit in memory.

        Args:
            backward: forward and backward of a batch, returns its loss.
            model: the student in its wrapper.

        Returns:
            The loss to log, to which a batch adds 0 if its own is not finite.
        """
        losses, failure, released = self.trainer.step.losses, None, False
        try:
            for batch in batches:
                losses.append(self._in_pieces(backward, model, batch, last=batch is batches[-1]))
        except torch.OutOfMemoryError as error:
            rows = self._rows_at_a_time(batch)
            released = self._release(first_line(error))
            # More rows than the flag says are together because they are short: that is ours to undo.
            ours = rows > self.args.per_device_train_batch_size and self._can_start_anew
            if not released and (rows == 1 or not (ours or self.args.auto_micro_batch)):
                raise
            failure = first_line(error)
        if failure is None:
            return sum(torch.where(loss.isfinite(), loss, 0.0) for loss in losses)
        # Outside of the handler, whose traceback keeps the tensors alive.
        if not released:
            self._halve(rows, failure)
        clear_device_cache(garbage_collection=True)
        model.zero_grad()
        self.metrics.restore(self._sums_before)
        losses.clear()
        return self.train_on(backward, model, batches)

    def out_of_memory(self, error: torch.OutOfMemoryError) -> RunStopped:
        """The error of a training that ran out of memory, with the micro-batch's shape and flags that help."""
        step, shape = self.trainer.step, ""
        if len(step.losses) < len(step.batches) and not self.phases.doing.startswith("generating"):
            batch = step.batches[len(step.losses)]
            shape = f" of {batch.rows} rows x {batch.input_ids.shape[1]} tokens"
        return out_of_memory(error, self.phases.doing, shape)

    @property
    def micro_rows(self) -> int | None:
        """How many rows fit in memory at a time; None if whole micro-batches do, or if the flag wants no smaller ones."""
        rows, least = self.choices.get(MICRO_ROWS) or 0, self.args.per_device_train_batch_size
        return rows or None if self.args.auto_micro_batch or rows >= least else None

    def _rows_at_a_time(self, batch: Batch) -> int:
        return min(batch.rows, self.micro_rows or batch.rows)

    @property
    def _can_start_anew(self) -> bool:
        """A step in the middle of its backward can be undone: no other rank takes part in it."""
        trainer = self.trainer
        return self.accelerator.num_processes == 1 and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)

    def _in_pieces(
        self, backward: Callable[[Batch], torch.Tensor], model: nn.Module, batch: Batch, last: bool
    ) -> torch.Tensor:
        """The loss of a batch; gradients are reduced over the ranks with the last piece of the `last` batch."""
        rows = self._rows_at_a_time(batch)
        pieces = [batch] if rows == batch.rows else list(batch.pieces(rows))
        losses = []
        for i, piece in enumerate(pieces):
            with nullcontext() if last and i == len(pieces) - 1 else self._unsynchronized(model):
                losses.append(backward(piece))
        return losses[0] if len(losses) == 1 else sum(losses)

    @contextmanager
    def _unsynchronized(self, model: nn.Module) -> Iterator[None]:
        """Inside the context, gradients are not reduced over the ranks."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)

    def _release(self, failure: str) -> bool:
        """Gives up the memory that only speed needs, from here on; whether there was any.

        Raises:
            RunStopped: of several ranks, as `_halve`.
        """
        if not self.trainer.student.release():
            return False
        message = (
            f"Out of memory in {self.phases.doing} ({failure}): from here on the student's forward has no CUDA graphs, and "
            "--gradient_checkpointing is for all layers."
        )
        self.choices.lower(SPARE_MEMORY, 0, message, stops=not self._can_start_anew)
        if not self._can_start_anew:
            raise RunStopped(f"{message} Start again with --resume_from_checkpoint auto.")
        return True

    def _halve(self, rows: int, failure: str) -> None:
        """Halves the rows at a time from here on; the global batch stays.

        Raises:
            RunStopped: of several ranks, since the others are in the middle of this step, which can't be undone.
        """
        fewer, stops = -(-rows // 2), not self._can_start_anew
        if not self.args.auto_micro_batch:  # the flag's rows stay together
            fewer = max(fewer, self.args.per_device_train_batch_size)
        message = f"Out of memory in {self.phases.doing} with {rows} rows at a time ({failure})"
        go_on = f"{message}: micro-batches go on in pieces of {fewer}; the global batch is the same."
        self.choices.lower(MICRO_ROWS, fewer, go_on, stops)
        if stops:
            raise RunStopped(
                f"{message}. {Path(self.args.output_dir, NAME)} now says {fewer}: start again with "
                "--resume_from_checkpoint auto, which takes the same global batch in smaller pieces."
            )
