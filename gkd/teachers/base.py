"""A teacher, as training sees it: a model here, or something that knows what one said."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from gkd.data.batch import Batch
from gkd.losses.targets import Target
from gkd.models.pairing import Side


class Teacher:
    """What a command and the trainer ask of a teacher. By itself it needs nothing, has no model and writes no text.

    A command asks in this order, before weights load: `settle`, `side`, `rehearse`, `rows`; then `load`. The trainer asks
    for the rest, of what `load` has returned.

    Attributes:
        model, inner: as it is wrapped, and without its wrapper; None of one that is no model in this process.
        sharded: over the ranks, which must then run it in step.
        stays: its weights stay where they are, so that its forward and its decoding may be CUDA graphs.
        capture_seconds: spent so far on capturing CUDA graphs of its forward.
        brings_rows: `rows` has the rows to train on, and no dataset is read.
    """

    model: nn.Module | None = None
    inner: nn.Module | None = None
    sharded = False
    stays = True
    capture_seconds = 0.0
    brings_rows = False

    def settle(self, data_args: Any, args: Any, given: set[str]) -> None:
        """Sets the flags that it decides. Raises ValueError where the user, whose flags are `given`, says otherwise."""

    def side(self, student: Side, args: Any) -> Side:
        """What it says about tokens, for a `Pairing`. Raises ValueError if the student or `args` do not fit."""
        raise NotImplementedError

    def rehearse(self) -> None:
        """Raises ValueError for weights that can't be loaded whole; none are read."""

    def rows(self) -> Dataset | None:
        """The encoded rows that it brings."""
        return None

    def load(self) -> Any:
        """What `GKDTrainer` takes as `teacher_model`: a model, a teacher, or None where the student is its own."""
        return self

    def stay(self) -> AbstractContextManager:
        """While it lasts, weights that come to the device stay there."""
        return nullcontext()

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Called before an optimizer step trains: may put `teacher_output` into its batches."""

    def target(self, batch: Batch) -> AbstractContextManager[Target]:
        """A context with what is known of it at the batch's scored positions.

        It uses `batch.teacher_output` where that is set.
        """
        raise NotImplementedError

    def writing(self) -> AbstractContextManager[tuple[nn.Module, torch.device]]:
        """A context with the model, as wrapped, and the device where it reads prompts."""
        raise ValueError("This teacher writes no text.")
