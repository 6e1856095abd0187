"""Student and teacher with different tokenizers: what their ids have in common, and texts in the other's ids."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice, takewhile
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gkd.data.alignment import (
    Alignment,
    Writes,
    align,
    drops_spaces,
    encoded_bytes,
    shared_classes,
    token_bytes,
)
from gkd.data.batch import IGNORE, Batch, padded_rows, unpadded_rows
from gkd.data.encoding import RowEncoder
from gkd.models.tokenizers import VocabularyMismatch, tokenizer_fingerprint

_SURVEYED = 256  # rows
_STOP = 256  # the symbol of the token that ends an answer; those of other special tokens follow


@dataclass(frozen=True)
class Lexicon:
    """A tokenizer and what its ids write.

    Attributes:
        ending: the id with which the model ends an answer; `stop_ids` are all that do.
        writes: of each id.
        size: the number of ids that are compared: of the tokenizer, without a model's padding.
        drops_spaces: no id writes the spaces between words.
    """

    tokenizer: PreTrainedTokenizerBase
    ending: int
    stop_ids: list[int]
    writes: list[Writes]
    size: int
    drops_spaces: bool

    @cached_property
    def ids(self) -> dict[Writes, int]:
        """The first id that writes each text or symbol; of the end of an answer `ending`."""
        ids: dict[Writes, int] = {}
        for index, writes in enumerate(self.writes):
            if writes is not None:
                ids.setdefault(writes, index)
        return ids | {_STOP: self.ending}

    def text(self, ids: list[int]) -> bytes:
        """The bytes that ids write, without special tokens."""
        return b"".join(writes for index in ids if isinstance(writes := self.writes[index], bytes))

    def names(self) -> dict[str, int]:
        """The special tokens."""
        vocabulary = self.tokenizer.get_vocab().items()
        return {token: index for token, index in vocabulary if index < self.size and self.writes[index] is None}


def _lexicons(student: RowEncoder, teacher: RowEncoder, sizes: tuple[int, int]) -> tuple[Lexicon, Lexicon]:
    """Both sides, with the same symbol for special tokens of one name, and for others that end an answer."""
    sides = []
    for encoder, size in zip((student, teacher), sizes, strict=True):
        writes = token_bytes(encoder.tokenizer)[:size]
        stops = [i for i in encoder.stop_ids if i < len(writes)]
        drops = drops_spaces(encoder.tokenizer)
        sides.append(Lexicon(encoder.tokenizer, encoder.ending(), stops, list(writes), len(writes), drops))
    names = [side.names() for side in sides]
    # A token that ends the answers of one side alone has another role on the other.
    roles = [
        {(name, index in side.stop_ids) for name, index in own.items()} for side, own in zip(sides, names, strict=True)
    ]
    symbols = {name: symbol for symbol, (name, _) in enumerate(sorted(roles[0] & roles[1]), _STOP + 1)}
    for side, own in zip(sides, names, strict=True):
        for name, index in own.items():
            side.writes[index] = symbols.get(name, _STOP if index in side.stop_ids else None)
        side.writes[side.ending] = _STOP
    return tuple(sides)


@dataclass(frozen=True)
class Survey:
    """How the answers of some rows align.

    Attributes:
        rows: those with an answer.
        lost: the numbers of those whose answer the teacher's tokens do not write to the end.
        tokens: the student's in all answers; `aligned` of them begin where one of the teacher's does.
        example: the ids of an answer, the student's and the teacher's; None without answers.
        cached: the teacher has read the answers before.
    """

    rows: int
    lost: list[int]
    tokens: int
    aligned: int
    example: tuple[list[int], list[int]] | None
    cached: bool = False

    @property
    def is_lost(self) -> bool:
        """Whether the text of all answers is changed; of a cache, which may be cut, whether nothing is common but their beginnings."""
        return 0 < self.rows == len(self.lost) and not (self.cached and self.aligned > self.rows)

    @property
    def changed(self) -> str:
        """What has become of the text of those that are lost."""
        if self.cached:
            return (
                "the teacher has read otherwise, or not to the end (another chat template, --max_length of gkd cache)"
            )
        return "the teacher's tokenizer changes"


@dataclass
class CrossVocabulary:
    """Two vocabularies, and texts in the ids of the other.

    Attributes:
        window: tokens that the teacher can read; None if that is not known.
    """

    student: Lexicon
    teacher: Lexicon
    window: int | None = None

    @classmethod
    def of(
        cls, student: RowEncoder, teacher: RowEncoder, sizes: tuple[int, int], window: int | None
    ) -> "CrossVocabulary":
        """Of the encoders of both models' prompts, which know their tokenizers and stop tokens.

        Args:
            sizes: the numbers of ids that the models have logits for.

        Raises:
            VocabularyMismatch: what a tokenizer's tokens stand for can't be told, or nothing of it is in the other.
        """
        try:
            sides = _lexicons(student, teacher, sizes)
        except ValueError as error:
            raise VocabularyMismatch(f"--cross_tokenizer: {error}") from None
        words = [{w for w in side.writes if isinstance(w, bytes) and len(w) > 1} for side in sides]
        if all(words) and not words[0] & words[1]:
            raise VocabularyMismatch(
                "--cross_tokenizer shared: the tokenizers share no token of more than one byte, so the teacher's distribution "
                "says next to nothing of the student's tokens: take the teacher's text (--seq_kd True) through "
                "--teacher_text_url, or a teacher with a tokenizer that is nearer."
            )
        return cls(*sides, window)

    @cached_property
    def classes(self) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
        """The class of each id of student (Vs,) and teacher (Vt,), -1 of those that are left out, int64; their number; and
        which of the student's ids the teacher's vocabulary lacks, bool (Vs,)."""
        sides = self.student, self.teacher
        writes, tokenizers = zip(*((side.writes, side.tokenizer) for side in sides), strict=True)
        (student, teacher), _, count = shared_classes(writes, tokenizers)
        others = set(self.teacher.writes)
        lacking = torch.tensor([writes not in others for writes in self.student.writes])
        return torch.tensor(student), torch.tensor(teacher), count, lacking

    @property
    def matched(self) -> torch.Tensor:
        """The ids of student and teacher that write the same, int64 (2, M), the first of each that do."""
        sides = self.student.ids, self.teacher.ids
        common = [writes for writes in sides[0] if writes != b"" and writes in sides[1]]
        return torch.tensor([[side[writes] for writes in common] for side in sides], dtype=torch.long)

    @property
    def shares(self) -> tuple[float, float]:
        """The shares of the student's and the teacher's ids that write what an id of the other writes."""
        sides = self.student, self.teacher
        both = set(self.student.writes) & set(self.teacher.writes) - {None}
        return tuple(sum(writes in both for writes in side.writes) / side.size for side in sides)

    @cached_property
    def fingerprint(self) -> bytes:
        """Of both tokenizers."""
        return "".join(tokenizer_fingerprint(side.tokenizer) for side in (self.student, self.teacher)).encode()

    def align(self, student: list[int], teacher: list[int]) -> Alignment:
        """The alignment of the ids of one text."""
        sides = self.student, self.teacher
        writes = ([side.writes[i] for i in ids] for side, ids in zip(sides, (student, teacher), strict=True))
        return align(*writes, without_spaces=any(side.drops_spaces for side in sides))

    def align_read(self, student: list[int], teacher: list[int]) -> tuple[list[int], list[bool], list[int], bool]:
        """The `Alignment.positions` of an answer in the student's ids with what the teacher has read, and whether it is whole.

        A space that one tokenizer alone puts before an answer does not count; no span begins there then.
        """
        sides = (self.student, student), (self.teacher, teacher)
        first, second = ([side.writes[i] for i in ids] for side, ids in sides)
        spaced = [
            bool(writes) and isinstance(writes[0], bytes) and writes[0][:1] == b" " for writes in (first, second)
        ]
        if spaced == [True, False]:
            first[0] = first[0][1:]
        elif spaced == [False, True]:
            second[0] = second[0][1:]
        alignment = align(first, second, without_spaces=any(side.drops_spaces for side, _ in sides))
        before, begins, lengths = alignment.positions(len(student))
        if spaced[0] != spaced[1]:
            end = next((i for i, count in enumerate(before) if i and begins[i]), len(before))
            begins[:end], lengths[:end] = [False] * end, [0] * end
        return before, begins, lengths, alignment.whole

    def to_teacher(self, ids: list[int]) -> list[int]:
        """What the student's ids write, in the teacher's; as far as that can be written."""
        return _rewritten(ids, self.student, self.teacher)

    def to_student(self, ids: list[int]) -> list[int]:
        """What the teacher's ids write, in the student's; as far as that can be written."""
        return _rewritten(ids, self.teacher, self.student)

    def read(self, batch: Batch, prompts: torch.Tensor, mask: torch.Tensor) -> None:
        """Has the teacher read the batch's completions in its ids behind left-padded prompts (B, P) of its own.

        Sets the batch's `teacher_*` fields, `aligned` and `span_tokens`. A position inside of a span has the teacher's position
        where the span begins.
        """
        texts, at, aligned, lengths = [], [], [], []
        for prompt, completion in zip(unpadded_rows(prompts, mask), completions_of(batch), strict=True):
            ids = self.to_teacher(completion)
            if self.window is not None:
                ids = ids[: max(self.window - len(prompt), 0)]
            before, begins, of_spans = self.align(completion, ids).positions(len(completion))
            texts.append(prompt + ids)
            at.append([len(prompt) - 1 + count for count in before])
            aligned += begins
            lengths += of_spans
        device = batch.labels.device
        ids, ids_mask = padded_rows(texts, 0)
        flat = [row * ids.shape[1] + place for row, places in enumerate(at) for place in places]
        batch.teacher_input_ids, batch.teacher_attention_mask = ids.to(device), ids_mask.to(device)
        batch.teacher_scored = torch.tensor(flat, dtype=torch.long, device=device)
        batch.aligned = torch.tensor(aligned, dtype=torch.bool, device=device)
        batch.span_tokens = torch.tensor(lengths, dtype=torch.int16, device=device)

    def read_written(self, batch: Batch, written: list[list[int]]) -> torch.Tensor:
        """Aligns the batch's completions with what the teacher has read of each, `written` in its ids.

        Sets `aligned` and `span_tokens`. Returns the teacher's position of each of the N scored ones, int64 (N,): how many of all
        rows' M tokens stand before it, or before its span; M where the teacher has read no further, and nothing is compared.
        """
        at, aligned, lengths, read = [], [], [], 0
        total = sum(map(len, written))
        for completion, ids in zip(completions_of(batch), written, strict=True):
            before, begins, of_spans, _ = self.align_read(completion, ids)
            known = [count < len(ids) for count in before]
            at += [read + count if is_known else total for count, is_known in zip(before, known, strict=True)]
            aligned += [first and is_known for first, is_known in zip(begins, known, strict=True)]
            lengths += of_spans
            read += len(ids)
        device = batch.labels.device
        batch.aligned = torch.tensor(aligned, dtype=torch.bool, device=device)
        batch.span_tokens = torch.tensor(lengths, dtype=torch.int16, device=device)
        return torch.tensor(at, dtype=torch.long, device=device)

    def survey(self, encoded: Iterable[dict[str, Any]]) -> Survey:
        """Of the first rows that `gkd.data.encoding.RowEncoder` encoded; with `teacher_answer_ids` these are aligned with."""
        rows = tokens = aligned = 0
        lost, example, cached = [], None, False
        for number, row in enumerate(islice(encoded, _SURVEYED)):
            if not (answer := [label for label in row["labels"] if label != IGNORE]):
                continue
            cached = "teacher_answer_ids" in row
            written = list(row["teacher_answer_ids"]) if cached else self.to_teacher(answer)
            _, begins, _, whole = self.align_read(answer, written)
            rows, tokens = rows + 1, tokens + len(answer)
            aligned += sum(begins)
            lost += [] if whole else [number]
            example = example or (answer, written)
        return Survey(rows, lost, tokens, aligned, example, cached)

    def whole_bytes(self, student: list[int], teacher: list[int]) -> int:
        """The length in UTF-8 of a text in the ids of both; 0 where the teacher's are not all of it."""
        return len(self.student.text(student)) if self.align(student, teacher).whole else 0


def completions_of(batch: Batch) -> list[list[int]]:
    """The scored ids of each row."""
    return unpadded_rows(batch.labels, batch.labels != IGNORE)


def _rewritten(ids: list[int], source: Lexicon, target: Lexicon) -> list[int]:
    written: list[int] = []
    for is_text, run in groupby(ids, lambda index: isinstance(source.writes[index], bytes)):
        if is_text:
            run = list(run)
            text = source.tokenizer.decode(run).encode() if source.drops_spaces else source.text(run)
            more, complete = encoded_bytes(target.tokenizer, text, target.ids.get)
            known = [
                *takewhile(lambda index: index < target.size, more)
            ]  # a tokenizer may have more ids than its model
            written += known
            if not complete or len(known) < len(more):
                break
        else:
            more = [target.ids.get(source.writes[index]) for index in run]
            written += takewhile(lambda index: index is not None, more)
            if None in more:
                break
    return written
