"""A teacher, as training, evaluation and caching see it: a model here, a server, or something that knows what one said."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import GenerationConfig

from gkd.data.batch import Batch
from gkd.generation.generator import Generator
from gkd.losses.targets import Target
from gkd.models.pairing import Side


class Teacher:
    """What is asked of a teacher. By default it is no model here, writes no text, and reads what the student reads.

    A command asks `settle`, `side`, `rehearse` and `rows`, in this order, before weights load; then `load`. All else is
    asked of what `load` has returned.

    Attributes:
        model, inner: as it is wrapped, and without its wrapper; None of one that is no model in this process.
        size: its parameters and their bytes, as results tell them.
        sharded: over the ranks, which must then run it in step.
        stays: its weights stay where they are, so that its forward and its decoding may be CUDA graphs.
        capture_seconds: spent so far on capturing CUDA graphs of its forward.
        writes: it has `write`, without which it can't be evaluated.
        brings_rows: `rows` has the rows to train on, and no dataset is read.
        keeps_rows: encoded rows keep the raw row as JSON, under `row`, for `columns`.
    """

    model: nn.Module | None = None
    inner: nn.Module | None = None
    size: tuple[int, int] = (0, 0)
    sharded = False
    stays = True
    capture_seconds = 0.0
    writes = False
    brings_rows = False
    keeps_rows = False

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

    def place(self, put: Callable[[nn.Module], "Teacher"]) -> None:
        """Puts models of its own where the flags want them: `put` makes a teacher of each."""

    # ------------------------------------------------------------------ what it reads and says

    def columns(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What a collated batch is to hold for `read`, from its encoded rows."""
        return {}

    def read(self, batch: Batch, collated: dict[str, Any]) -> None:
        """Fills in what it reads at the batch's scored tokens, or has said there; by default what the student reads.

        The one place for it: called for each batch, of dataset rows and of written text, in training, evaluation and caching.

        Args:
            batch: its `teacher_*` fields are to be set.
            collated: the batch of `gkd.data.batch.GKDCollator` whose prompts it has, with `columns`.
        """

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Called before an optimizer step trains: may put `teacher_output` into its batches."""

    def target(self, batch: Batch) -> AbstractContextManager[Target]:
        """A context with what is known of it at the batch's scored positions.

        It uses `batch.teacher_output` where that is set.
        """
        raise NotImplementedError

    def stay(self) -> AbstractContextManager:
        """While it lasts, weights that come to the device stay there."""
        return nullcontext()

    # ------------------------------------------------------------------ what it writes

    def decode_by(self, generator: Generator) -> None:
        """A model in this process writes with this one."""

    def write(
        self, prompts: torch.Tensor, mask: torch.Tensor, config: GenerationConfig, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Completions (B, T) of left-padded prompts (B, P), and their mask; see `gkd.generation.modes.complete`."""
        raise ValueError("This teacher writes no text.")

    def identity(self, config: GenerationConfig) -> bytes | None:
        """Tells what it writes so from all other text: by it text is cached, and evaluations are compared.

        None: it can't be told apart, so none of its text is used again.
        """
        return None
