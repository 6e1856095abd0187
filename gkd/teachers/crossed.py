"""A teacher with another tokenizer than the student, here, behind `gkd serve` or in a cache: it reads and writes the same texts in
its own ids."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import GenerationConfig

from gkd.config.teacher import TeacherArguments
from gkd.data.batch import IGNORE, Batch, padded_rows, prompts_of, unpadded_rows
from gkd.generation.generator import Generator
from gkd.losses.crossed import ClassMaps, CrossedTarget, Spans
from gkd.losses.crossed_topk import CrossedTopK
from gkd.losses.targets import Target
from gkd.losses.uld import UldTarget
from gkd.models.cross_vocabulary import CrossVocabulary, completions_of
from gkd.models.pairing import Pairing
from gkd.teachers.base import Teacher
from gkd.teachers.placed import place_teacher


def place_paired(
    teacher: nn.Module | Teacher,
    accelerator: Accelerator,
    args: TeacherArguments,
    pairing: Pairing,
    zero3: bool = False,
    fsdp: bool = False,
) -> Teacher:
    """`gkd.teachers.placed.place_teacher`, with a `CrossedTeacher` around a teacher that has another tokenizer.

    Raises ValueError as that does, and for a teacher with another tokenizer that gives no hidden states.
    """
    cross = pairing.cross
    if cross is None:
        return place_teacher(teacher, accelerator, args, pairing.tokenizer.pad_token_id, zero3, fsdp)
    placed = place_teacher(teacher, accelerator, args, 0)
    if placed.brings_rows:
        return CrossedCache(placed, cross, accelerator.device)
    if not placed.gives_hidden:
        raise ValueError("--cross_tokenizer needs one teacher that is a model, in this process or behind gkd serve.")
    return CrossedTeacher(placed, cross, args.cross_tokenizer, pairing.sizes[1], accelerator.device)


@dataclass
class _Ahead:
    """What the teacher was asked for ahead, as a batch's `teacher_output`. Its own positions are as many as its own tokens, so a
    part of the batch has none of it, and asks anew."""

    output: Any

    def to(self, device: Any) -> "_Ahead":
        return self

    def __getitem__(self, tokens: Any) -> None:
        return None


def maps_of(cross: CrossVocabulary, device: torch.device) -> ClassMaps:
    """The classes of both vocabularies' ids."""
    student, teacher, count, lacking = cross.classes
    return ClassMaps(student.to(device), teacher.to(device), count, lacking.to(device))


class CrossedTeacher(Teacher):
    """A placed teacher whose texts are translated.

    Args:
        teacher: reads and writes its own ids; it `gives_hidden`.
        cross: both vocabularies.
        loss: how --cross_tokenizer compares, "shared" or "uld".
        logits: the number of ids that the teacher has logits for.
        device: the student's.
    """

    writes = True
    _prepared: tuple[Batch, ...] = ()

    def __init__(self, teacher: Teacher, cross: CrossVocabulary, loss: str, logits: int, device: torch.device):
        self._teacher, self.cross, self._logits, self._device = teacher, cross, logits, device
        self.model, self.inner, self.name = teacher.model, teacher.inner, teacher.name
        self.sharded, self.stays = teacher.sharded, teacher.stays
        self._by_rank = loss == "uld"
        self.unknown = UldTarget.unknown if self._by_rank else ()

    @property
    def size(self) -> tuple[int, int]:
        return self._teacher.size

    @property
    def packs(self) -> bool:
        return self._teacher.packs

    @property
    def capture_seconds(self) -> float:
        return self._teacher.capture_seconds

    @cached_property
    def _maps(self) -> ClassMaps:
        return maps_of(self.cross, self._device)

    @cached_property
    def _matched(self) -> torch.Tensor:
        return self.cross.matched.to(self._device)

    def read(self, batch: Batch, collated: dict[str, Any]) -> None:
        """Raises ValueError where rows were encoded without the teacher's prompts."""
        if "teacher_prompts" not in collated:
            raise ValueError(
                "--cross_tokenizer: these rows were encoded without the teacher's prompts: pass raw rows, or encode them by "
                "the `encoder` of a Pairing with --cross_tokenizer."
            )
        self.cross.read(batch, *prompts_of(collated, teacher=True))

    def prepare(self, batches: Iterable[Batch]) -> None:
        for batch in self._prepared:  # of the step before
            batch.teacher_output = None
        self._prepared = tuple(batches)
        every = [self._own(batch)[0] for batch in self._prepared]
        self._teacher.prepare(every)
        for batch, own in zip(self._prepared, every, strict=True):
            batch.teacher_output = None if own.teacher_output is None else _Ahead(own.teacher_output)

    @contextmanager
    def target(self, batch: Batch) -> Iterator[Target]:
        device = self._device
        own, following = self._own(batch)
        at = torch.searchsorted(own.teacher_scored, batch.teacher_scored)  # (N,) among its own positions
        spans = Spans(batch.next_ids, at, following, batch.aligned, batch.span_tokens).to(device)
        with self._teacher.target(own) as known:
            if self._by_rank:
                yield UldTarget(known, self._maps, spans, self._matched)
            else:
                yield CrossedTarget(known, self._maps, spans)

    @staticmethod
    def _own(batch: Batch) -> tuple[Batch, torch.Tensor]:
        """The batch with all M positions of its own tokens of the completions, and the token that follows each, (M,); behind
        the last of a row any."""
        ids, mask, at = batch.teacher_inputs
        width = ids.shape[1]
        ends = batch.teacher_lengths.to(ids.device) if mask is None else mask.sum(1)  # (B,)
        row_of_token = batch.scored // batch.input_ids.shape[1]  # (N,)
        starts = ends.scatter_reduce(0, row_of_token, at % width, "amin")  # (B,)
        columns = torch.arange(width, device=ids.device)
        own = ((columns >= starts[:, None]) & (columns < ends[:, None])).flatten().nonzero()[:, 0]
        following = ids.flatten().index_select(0, (own + 1).clamp(max=ids.numel() - 1))
        ahead = batch.teacher_output
        return replace(batch, teacher_scored=own, teacher_output=ahead and ahead.output), following

    def stay(self) -> AbstractContextManager:
        return self._teacher.stay()

    def decode_by(self, generator: Generator) -> None:
        self._teacher.decode_by(generator)

    def write(self, prompts, mask, config, seed) -> tuple[torch.Tensor, torch.Tensor]:
        """Completions in the student's ids, of left-padded prompts in the teacher's."""
        written = self._teacher.write(prompts.where(mask.bool(), 0), mask, self._own_config(config), seed)
        texts = [self.cross.to_student(row)[: config.max_new_tokens] for row in unpadded_rows(*written)]
        ids, ids_mask = padded_rows(texts, config.pad_token_id)
        return ids.to(prompts.device), ids_mask.to(prompts.device)

    def _own_config(self, config: GenerationConfig) -> GenerationConfig:
        own = copy(config)
        own.pad_token_id, own.eos_token_id = 0, self.cross.teacher.stop_ids
        own.suppress_tokens = [*range(self.cross.teacher.size, self._logits)] or None
        return own

    def identity(self, config: GenerationConfig) -> bytes | None:
        identity = self._teacher.identity(self._own_config(config))
        return None if identity is None else hashlib.sha256(identity + self.cross.fingerprint).digest()

    def text_sums(self, batch: Batch) -> list[dict[str, float]]:
        own, following = self._own(batch)
        width = batch.teacher_input_ids.shape[1]
        row_of_token, ends = own.teacher_scored // width, batch.teacher_attention_mask.sum(1)
        inside = own.teacher_scored % width + 1 < ends[row_of_token]  # a token of the text follows
        written = [[] for _ in range(batch.rows)]
        for row, token in zip(row_of_token[inside].tolist(), following[inside].tolist(), strict=True):
            written[row].append(token)
        texts = zip(completions_of(batch), written, strict=True)
        return [{"bytes": self.cross.whole_bytes(*both)} for both in texts]

    def begun(self, tokens: list[int]) -> list[int]:
        return self.cross.to_teacher(tokens)


class CrossedCache(Teacher):
    """A cache for students of any tokenizer: what the teacher says at its own tokens is looked up where the student's begin.

    So what a batch has of it is of the student's positions: a `gkd.losses.topk.TopK` as of `CrossedTopK.known`.
    """

    brings_rows = True
    coarse = True

    def __init__(self, cache: Teacher, cross: CrossVocabulary, device: torch.device):
        self._cache, self.cross, self._device = cache, cross, device
        self.name, self.fingerprints = cache.name, cache.fingerprints
        self._maps = maps_of(cross, torch.device("cpu"))  # where batches are read

    @cached_property
    def _maps_there(self) -> ClassMaps:
        return maps_of(self.cross, self._device)

    def columns(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return self._cache.columns(rows)

    def read(self, batch: Batch, collated: dict[str, Any]) -> None:
        """Raises ValueError for rows that are not of the cache."""
        if "teacher_answers" not in collated:
            raise ValueError("--cross_tokenizer with --teacher_cache: these rows are not of the cache: pass none.")
        answers = collated["teacher_answers"]
        written = unpadded_rows(answers, answers != IGNORE)
        at = self.cross.read_written(batch, written)
        following = torch.tensor([token for row in written for token in row], dtype=torch.long)
        spans = Spans(batch.next_ids, at, following, batch.aligned, batch.span_tokens).to("cpu")
        known = CrossedTopK.known_at(collated["teacher_output"], spans, self._maps)
        batch.teacher_output = known.to(batch.labels.device)

    @contextmanager
    def target(self, batch: Batch) -> Iterator[Target]:
        yield CrossedTopK(batch.teacher_output, self._maps_there, batch.next_ids, batch.aligned)
