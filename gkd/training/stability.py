"""Steps with gradients that are not finite are skipped; micro-batches that don't fit in memory are split."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import Trainer

from gkd.data.batch import IGNORE, Batch
from gkd.io.errors import RunStopped, first_line
from gkd.io.files import put_aside, write_json
from gkd.training.faults import NonfiniteSteps, go_on_from, out_of_memory

logger = get_logger(__name__)
MICRO_BATCH = "micro_batch.json"
_SCALER_SEARCH = 40  # steps that fp16's GradScaler may skip until its scale fits


class Stability:
    """Skips steps that are not finite, and splits micro-batches that don't fit in memory.

    Args:
        trainer: a `gkd.training.trainer.GKDTrainer` with its `step`, `source_metrics`, `phases` and `sharded`.

    Attributes:
        skipped: counts the skipped steps.
        micro_rows: how many rows fit in memory at a time; None if whole micro-batches do.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator
        self.metrics, self.phases, self.sharded = trainer.source_metrics, trainer.phases, trainer.sharded
        self._sums_before: tuple[torch.Tensor, ...] = ()
        path = Path(self.args.output_dir, f"_skipped_steps-{self.args.process_index}.jsonl")
        limit = max(self.args.max_skipped_steps, _SCALER_SEARCH if self.args.fp16 else 0)
        self.skipped = NonfiniteSteps(limit, self._describe, path, self.bad_weight)
        # Sums of the finite losses of skipped steps: since the last log, and before it.
        self._skipped_loss = torch.zeros((), device=self.args.device)
        self._skipped_losses = 0.0
        self.micro_rows = _micro_rows_that_fit(self.args)

    def begin(self) -> None:
        """Before the trainer's next `step` trains."""
        if self.args.auto_micro_batch:
            self._sums_before = self.metrics.state()

    # ------------------------------------------------------------------ steps that are not finite

    def end(self, norm: torch.Tensor | float) -> None:
        """After a step's backward: has the optimizer skip the step if the gradient's norm is not finite."""
        self.phases.at("the optimizer's step")
        rows = [(batch.input_ids, batch.labels) for batch in self.trainer.step.batches]
        bad = self._skip_if_bad(norm)
        self.skipped.add(self.trainer.state.global_step + 1, bad, rows, self.trainer.step.losses)
        finite = sum(torch.where(loss.isfinite(), loss, 0.0) for loss in self.trainer.step.losses)
        self._skipped_loss += torch.where(bad.to(self._skipped_loss.device), finite, 0.0)

    def log(self, logs: dict[str, float]) -> None:
        """Adds the number of skipped steps; losses then average the other steps, NaN if there are none."""
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

    def _describe(self, ids: torch.Tensor, labels: torch.Tensor) -> list[dict[str, str]]:
        """Prompt and completion of each row of ids and labels (B, L)."""
        decode = self.trainer.processing_class.decode
        rows = []
        for row, targets in zip(ids.cpu(), labels.cpu(), strict=True):
            scored = (targets != IGNORE).nonzero()[:, 0]
            start = int(scored[0]) if len(scored) else len(row)
            completion = row[start:][targets[start:] >= 0]
            rows.append({"prompt": decode(row[:start]), "completion": decode(completion)})
        return rows

    # ------------------------------------------------------------------ memory

    def train_on(self, backward: Callable[[Batch], torch.Tensor], model: nn.Module, batch: Batch) -> torch.Tensor:
        """Forward and backward of a micro-batch, in pieces if it did not fit in memory.

        Args:
            backward: forward and backward of a batch, returns its loss.
            model: the student in its wrapper.

        Returns:
            The loss to log: 0 if it is not finite.
        """
        failure = None
        try:
            loss = self._in_pieces(backward, model, batch)
        except torch.OutOfMemoryError as error:
            if not self.args.auto_micro_batch or self._rows_at_a_time(batch) == 1:
                raise
            failure = first_line(error)
        if failure is not None:  # outside of the handler, whose traceback keeps the tensors alive
            self._halve(batch, failure)
            model.zero_grad()
            self.metrics.restore(self._sums_before)
            done = len(self.trainer.step.losses)
            self.trainer.step.losses.clear()
            for earlier in self.trainer.step.batches[:done]:
                self.train_on(backward, model, earlier)
            return self.train_on(backward, model, batch)
        self.trainer.step.losses.append(loss)
        return torch.where(loss.isfinite(), loss, 0.0)

    def out_of_memory(self, error: torch.OutOfMemoryError) -> RunStopped:
        """The error of a training that ran out of memory, with the micro-batch's shape and flags that help."""
        shape = "".join(
            f" of {batch.rows} rows x {batch.input_ids.shape[1]} tokens"
            for batch in self.trainer.step.batches[len(self.trainer.step.losses) :][:1]
            if not self.phases.doing.startswith("generating")
        )
        return out_of_memory(error, self.phases.doing, shape)

    def _rows_at_a_time(self, batch: Batch) -> int:
        return min(batch.rows, self.micro_rows or batch.rows)

    def _in_pieces(self, backward: Callable[[Batch], torch.Tensor], model: nn.Module, batch: Batch) -> torch.Tensor:
        rows = self._rows_at_a_time(batch)
        pieces = [batch] if rows == batch.rows else list(batch.pieces(rows))
        losses = []
        for i, piece in enumerate(pieces):
            with self._unsynchronized(model) if i < len(pieces) - 1 else nullcontext():
                losses.append(backward(piece))
        return losses[0] if len(losses) == 1 else sum(losses)

    @contextmanager
    def _unsynchronized(self, model: nn.Module) -> Iterator[None]:
        """Gradients are not reduced over the ranks: they are with the last piece."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)

    def _halve(self, batch: Batch, failure: str) -> None:
        """Halves the rows at a time from here on; the global batch stays.

        Raises:
            RunStopped: of several ranks, since the others are in the middle of this step, which can't be undone.
        """
        rows = self._rows_at_a_time(batch)
        self.micro_rows = -(-rows // 2)
        path = Path(self.args.output_dir, MICRO_BATCH)
        write_json(path, {"rows": self.micro_rows})
        message = f"Out of memory in {self.phases.doing} with {rows} rows at a time ({failure})"
        ranks = self.accelerator.num_processes
        if ranks > 1 or self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled:
            raise RunStopped(
                f"{message}. {path} now says {self.micro_rows}: start again with --resume_from_checkpoint auto, which "
                "takes the same global batch in smaller pieces."
            )
        logger.warning(f"{message}: micro-batches go on in pieces of {self.micro_rows}; the global batch is the same.")
        clear_device_cache(garbage_collection=True)


def _micro_rows_that_fit(args) -> int | None:
    """What an earlier run of --auto_micro_batch wrote to this folder."""
    path = Path(args.output_dir, MICRO_BATCH)
    if not args.auto_micro_batch or not path.is_file():
        return None
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["rows"])
    except (ValueError, KeyError, TypeError) as error:
        put_aside(path, first_line(error), "What fits in memory is found again.")
        return None
