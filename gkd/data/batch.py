"""Batches: rows padded together, prompts joined with generated text, and which positions are scored."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F

IGNORE = -100


@dataclass
class GKDCollator:
    """Pads encoded rows to a batch.

    Returns `prompts` and `prompt_attention_mask` (B, P), left-padded for generation, and the same for `teacher_prompts`
    where rows have them, and `teacher_shares` (B, K), where they have those; `input_ids`, `attention_mask` and
    `labels` (B, L), the dataset's own text right-padded, labels -100 where nothing is scored; `answer_cut` (B,); and what
    `extras` computes from the rows, see `gkd.teachers.base.Teacher.columns`.
    """

    pad_token_id: int
    extras: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        prompts, prompt_mask = padded_rows([r["prompt_ids"] for r in rows], self.pad_token_id, left=True)
        ids, mask = padded_rows([r["input_ids"] for r in rows], self.pad_token_id)
        teachers = {}
        if any("teacher_prompt_ids" in r for r in rows):  # rows of a stream may lack the column
            read = [r.get("teacher_prompt_ids", r["prompt_ids"]) for r in rows]
            padded = padded_rows(read, self.pad_token_id, left=True)
            teachers = dict(zip(_PROMPTS[True], padded, strict=True))
        if "teacher_shares" in rows[0]:
            teachers["teacher_shares"] = torch.tensor([r["teacher_shares"] for r in rows])
        return {
            "prompts": prompts,
            "prompt_attention_mask": prompt_mask,
            **teachers,
            "input_ids": ids,
            "attention_mask": mask,
            "labels": padded_rows([r["labels"] for r in rows], IGNORE)[0],
            "answer_cut": torch.tensor([r["answer_cut"] for r in rows]),
            **(self.extras(rows) if self.extras is not None else {}),
        }


# The collator's names of prompts and their mask, as the student and as the teacher reads them.
_PROMPTS = {False: ("prompts", "prompt_attention_mask"), True: ("teacher_prompts", "teacher_prompt_attention_mask")}


def prompts_of(collated: Mapping[str, Any], teacher: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The left-padded prompts (B, P) of a batch of `GKDCollator` and their mask; the teacher's where they differ."""
    names = _PROMPTS[teacher and "teacher_prompts" in collated]
    return tuple(collated[name] for name in names)


def stack_prompts(
    batches: list[dict[str, torch.Tensor]], pad: int, teacher: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`prompts_of` several micro-batches as one batch (B, P) with its mask."""
    parts = [prompts_of(batch, teacher) for batch in batches]
    width = max(prompts.shape[1] for prompts, _ in parts)
    padded = ([F.pad(t, (width - t.shape[1], 0), value=v) for t, v in zip(p, (pad, 0), strict=True)] for p in parts)
    prompts, masks = zip(*padded, strict=True)
    return torch.cat(prompts), torch.cat(masks)


def training_batch(
    prompts: torch.Tensor,
    prompt_mask: torch.Tensor,
    completions: torch.Tensor,
    completion_mask: torch.Tensor,
    pad: int,
) -> "Batch":
    """Joins left-padded prompts (B, P) and completions (B, T) to right-padded training rows, padding trimmed.

    Labels (B, L) are -100 outside the completion. With all padding on the right a token's position is its index, for
    models with learned positions too.
    """
    ids = torch.cat([prompts, completions], dim=1)
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    scored = torch.cat([torch.zeros_like(prompt_mask), completion_mask], dim=1)
    left = prompts.shape[1] - prompt_mask.sum(1, keepdim=True)  # (B, 1) pad tokens before each prompt
    order = (torch.arange(ids.shape[1], device=ids.device)[None] + left) % ids.shape[1]  # (B, P + T) rotate them away
    order = order[:, : int(mask.sum(1).max())]  # (B, L)
    ids, mask, scored = (tensor.gather(1, order) for tensor in (ids, mask, scored))
    labels = torch.where(scored.bool(), ids, IGNORE)
    return Batch(torch.where(mask.bool(), ids, pad), labels, scored_positions(labels), mask)


def by_shares(shares: torch.Tensor | None, rows: list[int] | None = None) -> dict[str, torch.Tensor]:
    """What `Teacher.write` takes besides where there are several teachers: the shares (B, K), or those of some rows."""
    if shares is None:
        return {}
    return {"shares": shares if rows is None else shares[rows]}


def text_keys(prompts: torch.Tensor, mask: torch.Tensor, shares: torch.Tensor | None) -> list[list[int]]:
    """The ids of each prompt, by which a teacher's text is kept; of several teachers, with the number of the writer."""
    ids = unpadded_rows(prompts, mask)
    if shares is None:
        return ids
    return [[*row, -1 - writer] for row, writer in zip(ids, shares.argmax(1).tolist(), strict=True)]


def keys_of(collated: Mapping[str, Any]) -> list[list[int]]:
    """By what the teacher's text of each row of a collated batch is kept: `text_keys`, or the UTF-8 bytes of what a server
    is asked (the column `asked`)."""
    if "asked" in collated:
        return [list(asked.encode()) for asked in collated["asked"]]
    return text_keys(*prompts_of(collated, teacher=True), collated.get("teacher_shares"))


def read_after(batch: "Batch", prompts: torch.Tensor, mask: torch.Tensor) -> None:
    """Has the teacher read the batch's completions behind left-padded prompts (B, P) of its own."""
    prompts, mask = prompts.to(batch.labels.device), mask.to(batch.labels.device)
    kept = batch.labels != IGNORE
    lengths = kept.sum(1, keepdim=True)  # (B, 1) of the completions
    width = int(lengths.max())
    order = (~kept).int().argsort(dim=1, stable=True)[:, :width]  # scored tokens first, as they stand
    completions = batch.input_ids.gather(1, order)
    columns = torch.arange(width, device=lengths.device)
    whole = training_batch(prompts, mask, completions, (columns < lengths).long(), pad=0)
    batch.teacher_input_ids, batch.teacher_attention_mask = whole.input_ids, whole.attention_mask
    batch.teacher_scored = whole.scored


class Source(IntEnum):
    """Who wrote a completion. The value is also its row in `gkd.training.metrics.SourceMetrics`."""

    ON_POLICY = 0
    TEACHER = 1
    DATASET = 2

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass(eq=False)
class Batch:
    """The text of a micro-batch on one rank, ready for the loss, with the teacher's output where that is precomputed.

    The teacher may read other ids than the student (more context, another template): its scored positions stand for
    the same N tokens in the same order. transformers' Trainer reads a batch as a mapping of the fields that are set.

    Attributes:
        input_ids, labels: (B, L), right-padded; labels are -100 where nothing is scored.
        scored: (N,) the positions in the flattened (B · L) whose next token is scored.
        attention_mask: (B, L), or None where all padding stands on the right: no token that counts can see it, and
            attention without a mask is faster.
        teacher_input_ids, teacher_attention_mask, teacher_scored: (B, M), (B, M) and (N,), where they differ from the
            student's.
        lengths, teacher_lengths: (B,) on the CPU, tokens of each right-padded row, which a forward may then pack. Not set
            by hand: see `gkd.rollout.grouping.StepRows`.
        aligned: bool (N,), of a teacher with another tokenizer: whether its scored position stands at the same place in the
            text. Only there distributions are compared.
        span_tokens: int16 (N,), beside `aligned`: how many tokens the teacher has up to the next place that both have; 0 where
            there is none.
        teacher_shares: (B, K), of several teachers in what a row is compared with.
        teacher_output: precomputed teacher output of the N positions: hidden states (N, Ht) or a `gkd.losses.topk.TopK`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    scored: torch.Tensor
    attention_mask: torch.Tensor | None = None
    teacher_input_ids: torch.Tensor | None = None
    teacher_attention_mask: torch.Tensor | None = None
    teacher_scored: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    teacher_lengths: torch.Tensor | None = None
    aligned: torch.Tensor | None = None
    span_tokens: torch.Tensor | None = None
    teacher_shares: torch.Tensor | None = None
    teacher_output: Any = None

    @classmethod
    def of(cls, collated: "Mapping[str, Any] | Batch") -> "Batch":
        """The dataset's text in a batch of `GKDCollator`; a Batch as it is."""
        if isinstance(collated, Batch):
            return collated
        ids, labels, mask = (collated.get(name) for name in ("input_ids", "labels", "attention_mask"))
        return cls(ids, labels, scored_positions(labels), mask)

    @property
    def rows(self) -> int:
        return len(self.input_ids)

    @property
    def next_ids(self) -> torch.Tensor:
        """The token behind each of the N scored positions, int64 (N,)."""
        return self.labels.flatten().index_select(0, self.scored + 1)

    @property
    def teacher_inputs(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Ids, mask and scored positions as the teacher reads them: by default the student's."""
        if self.teacher_input_ids is None:
            return self.input_ids, self.attention_mask, self.scored
        return self.teacher_input_ids, self.teacher_attention_mask, self.teacher_scored

    @property
    def lengths_for_teacher(self) -> torch.Tensor | None:
        """Tokens of each row as the teacher reads it."""
        return self.lengths if self.teacher_input_ids is None else self.teacher_lengths

    def map(self, function: Callable[[Any], Any]) -> "Batch":
        """A new batch with `function` applied to each field that is set, but those that stay on the CPU."""
        return Batch(**{name: self[name] if name in ON_CPU else function(self[name]) for name in self})

    def to(self, device: torch.device | str) -> "Batch":
        return self.map(lambda values: values.to(device))

    def pieces(self, rows: int) -> Iterator["Batch"]:
        """Splits the batch into parts of `rows` rows, and the fields of its N scored tokens with them."""
        width = self.input_ids.shape[1]
        for start in range(0, self.rows, rows):
            tokens = slice(*(int((self.scored < row * width).sum()) for row in (start, start + rows)))
            part = Batch(
                **{name: self[name][tokens if name in PER_TOKEN else slice(start, start + rows)] for name in self}
            )
            part.scored = part.scored - start * width
            if part.teacher_scored is not None:
                part.teacher_scored = part.teacher_scored - start * part.teacher_input_ids.shape[1]
            yield part

    def only(self, rows: torch.Tensor) -> tuple["Batch", torch.Tensor]:
        """The batch of these rows, int64 (b,) in rising order, and which of the N scored tokens are theirs, (n,)."""
        fields, moved = {}, torch.full((self.rows,), -1, device=rows.device)
        moved[rows] = torch.arange(len(rows), device=rows.device)
        row_of_token = moved[self.scored // self.input_ids.shape[1]]  # (N,), -1 for those that are left out
        tokens = (row_of_token >= 0).nonzero()[:, 0]
        for name in self:
            at = tokens if name in PER_TOKEN else rows.to(self[name].device)
            fields[name] = self[name][at]
        for prefix in ("", "teacher_"):
            if (ids := fields.get(f"{prefix}input_ids")) is not None:
                width = ids.shape[1]
                fields[f"{prefix}scored"] = row_of_token[tokens] * width + fields[f"{prefix}scored"] % width
        return Batch(**fields), tokens

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in _FIELDS and getattr(self, name) is not None

    def __iter__(self) -> Iterator[str]:
        return (name for name in _FIELDS if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


_FIELDS = tuple(field.name for field in fields(Batch))
# Split by scored token, all others by row.
PER_TOKEN = ("scored", "teacher_scored", "aligned", "span_tokens", "teacher_output")
ON_CPU = ("lengths", "teacher_lengths")


def scored_positions(labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, L) -> flat positions (N,) that predict a scored token: position i predicts token i + 1."""
    scored = torch.zeros_like(labels, dtype=torch.bool)
    scored[:, :-1] = labels[:, 1:] != IGNORE
    return scored.flatten().nonzero()[:, 0]


def padded_rows(rows: list[list[int]], value: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of each row -> int64 (B, L) filled up with `value` on the right, or the left, and their mask."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), value)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, span], mask[i, span] = torch.tensor(row), 1
    return ids, mask


def unpadded_rows(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """(B, L) ids and mask -> the ids of each row without padding."""
    return [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu().bool(), strict=True)]
