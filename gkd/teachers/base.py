"""A teacher as training, evaluation and caching see it: a model in this process, a server, or a cache of its output."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import GenerationConfig

from gkd.data.batch import Batch, prompts_of, read_after
from gkd.generation.generator import Generator
from gkd.losses.targets import Target
from gkd.models.heads import LogitHead
from gkd.models.pairing import Pairing, Side


class Teacher:
    """Base class. By default a teacher is no model in this process, writes no text, and reads what the student reads.

    A command calls `settle`, `side`, `rehearse` and `rows`, in this order, before weights load; then `load`, whose result
    answers all other calls.

    Attributes:
        model, inner: with and without the wrapper that training gives it; None if it is no model in this process.
        size: the number of its parameters, and their bytes; 0 where they are not known.
        head_size: bytes of an output head that it reads from disk or a server with a position's hidden states, and of
            these; None if it reads none.
        sharded: its weights are sharded over the ranks, which must run it in step.
        stays: its weights keep their addresses, so that its forward and its decoding may be CUDA graphs.
        packs: its forward, if it has one here, needs no padding: see gkd.models.packing. All ranks ask at the same time.
        capture_seconds: seconds spent so far on capturing CUDA graphs of its forward.
        writes: it has `write`, without which it can't be evaluated.
        gives_hidden: its `target` is a `gkd.losses.targets.HiddenTarget`, at any positions of any ids that a batch names.
        coarse: of its distribution the likeliest tokens are known, and the mass of the rest.
        brings_rows: `rows` returns the rows to train on, and no dataset is read.
        unknown: names of the `TokenStatistics` that it can't tell, which are not logged.
        keeps_rows: encoded rows keep the raw row as JSON, under `row`, for `columns`.
        name: what results call it, where no flag names it.
        names: of several teachers, in the order of a row's shares.
        fingerprints: what a resumed run must find again, by the flag that names it but may change.
    """

    model: nn.Module | None = None
    inner: nn.Module | None = None
    size: tuple[int, int] = (0, 0)
    head_size: tuple[int, int] | None = None
    sharded = False
    stays = True
    packs = True
    capture_seconds = 0.0
    writes = False
    gives_hidden = False
    coarse = False
    brings_rows = False
    keeps_rows = False
    unknown: tuple[str, ...] = ()
    name: str | None = None
    names: tuple[str, ...] = ()
    fingerprints: Mapping[str, str] = MappingProxyType({})

    def settle(self, data_args: Any, args: Any, given: set[str]) -> None:
        """Sets the flags that it decides. Raises ValueError if the user typed another value; `given` names what was typed."""

    def side(self, student: Side, args: Any) -> Side:
        """Its tokenizer and vocabulary, for a `Pairing`. Raises ValueError if the student or `args` do not fit."""
        raise NotImplementedError

    def rehearse(self) -> None:
        """Raises ValueError for weights that can't be loaded completely; reads none."""

    def rows(self, pairing: Pairing | None = None) -> Dataset | None:
        """The encoded rows to train on, if `brings_rows`, for the student of the pairing."""
        return None

    def load(self) -> Any:
        """What `GKDTrainer` takes as `teacher_model`: a model, a teacher, or None where the student is its own."""
        return self

    def place(self, put: Callable[[nn.Module], "Teacher"]) -> None:
        """Places the models that it holds, if any: `put` moves one where the flags want it, and returns its teacher."""

    def columns(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Columns that `GKDCollator` adds to a batch of these encoded rows, for `read`."""
        return {}

    def read(self, batch: Batch, collated: dict[str, Any]) -> None:
        """Sets the batch's `teacher_*` fields, if it reads other ids than the student or its output is known.

        Called for each batch, of dataset rows and of written text, in training, evaluation and caching. `collated` is
        the collator's batch with the same prompts, and with `columns`. By default it reads `teacher_prompts`, where
        rows have them.
        """
        if "teacher_prompts" in collated:
            read_after(batch, *prompts_of(collated, teacher=True))

    def text_sums(self, batch: Batch) -> list[dict[str, float]]:
        """More sums over the text of each row, for an evaluation, of a batch that it has read; none by default.

        Of a teacher with another tokenizer `bytes`, the length of the text in UTF-8; 0 where its own tokens are not all of it.
        """
        return [{} for _ in range(batch.rows)]

    def begun(self, tokens: list[int]) -> list[int]:
        """The beginning of an answer in the student's ids -> in its own, to go on behind its prompt."""
        return tokens

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Called before an optimizer step trains; may set `teacher_output` of the step's batches."""

    def target(self, batch: Batch) -> AbstractContextManager[Target]:
        """A context with its output at the batch's scored positions: `batch.teacher_output` where that is set."""
        raise NotImplementedError

    def head(self) -> AbstractContextManager[LogitHead]:
        """A context with its output head, which makes logits of its hidden states. Raises ValueError if it has none."""
        raise ValueError("--keep hidden needs a teacher that is a model, here or behind a server: keep the top k.")

    def stay(self) -> AbstractContextManager:
        """Inside the context, weights that come to the device stay there."""
        return nullcontext()

    def decode_by(self, generator: Generator) -> None:
        """Sets the generator with which a model in this process writes."""

    def write(
        self, prompts: torch.Tensor, mask: torch.Tensor, config: GenerationConfig, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Completions (B, T) of left-padded prompts (B, P), and their mask; see `gkd.generation.generator.complete`.

        Several teachers also get `shares` (B, K) of each row.
        """
        raise ValueError("This teacher writes no text.")

    def identity(self, config: GenerationConfig) -> bytes | None:
        """A fingerprint of its weights and `config`: the key of cached text and of evaluations. None: nothing is reused."""
        return None
