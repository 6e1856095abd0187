"""Batches: rows padded together, text that was just written, and which positions are scored."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F

IGNORE = -100


@dataclass
class GKDCollator:
    """Pads encoded rows to a batch.

    Returns `prompts` and `prompt_attention_mask` (B, P), left-padded for generation; `input_ids`, `attention_mask` and
    `labels` (B, L), the dataset's own text right-padded, labels -100 where nothing is scored; `answer_cut` (B,).

    Args:
        extras: further entries of a batch, from its rows: what a teacher cache says of their scored tokens, say.
    """

    pad_token_id: int
    extras: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        prompts, prompt_mask = self._pad([r["prompt_ids"] for r in rows], self.pad_token_id, left=True)
        ids, mask = self._pad([r["input_ids"] for r in rows], self.pad_token_id)
        return {
            "prompts": prompts,
            "prompt_attention_mask": prompt_mask,
            "input_ids": ids,
            "attention_mask": mask,
            "labels": self._pad([r["labels"] for r in rows], IGNORE)[0],
            "answer_cut": torch.tensor([r["answer_cut"] for r in rows]),
            **(self.extras(rows) if self.extras is not None else {}),
        }

    @staticmethod
    def _pad(rows: list[list[int]], value: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), value)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            span = slice(width - len(row), width) if left else slice(0, len(row))
            ids[i, span], mask[i, span] = torch.tensor(row), 1
        return ids, mask


def stack_prompts(batches: list[dict[str, torch.Tensor]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The left-padded `prompts` (b, P) of several micro-batches as one batch (B, P) with its mask."""
    width = max(batch["prompts"].shape[1] for batch in batches)

    def stack(name: str, value: int) -> torch.Tensor:
        return torch.cat([F.pad(b[name], (width - b[name].shape[1], 0), value=value) for b in batches])

    return stack("prompts", pad), stack("prompt_attention_mask", 0)


def training_batch(
    prompts: torch.Tensor,
    prompt_mask: torch.Tensor,
    completions: torch.Tensor,
    completion_mask: torch.Tensor,
    pad: int,
) -> dict[str, torch.Tensor]:
    """Joins left-padded prompts (B, P) and completions (B, T) to right-padded training rows, padding trimmed.

    Returns:
        `input_ids`, `attention_mask` and `labels` (B, L); labels are -100 outside the completion. With all padding on
        the right a token's position is its index, for models with learned positions too.
    """
    ids = torch.cat([prompts, completions], dim=1)
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    scored = torch.cat([torch.zeros_like(prompt_mask), completion_mask], dim=1)
    left = prompts.shape[1] - prompt_mask.sum(1, keepdim=True)  # (B, 1) pad tokens before each prompt
    order = (torch.arange(ids.shape[1], device=ids.device)[None] + left) % ids.shape[1]  # (B, P + T) rotate them away
    ids, mask, scored = (tensor.gather(1, order) for tensor in (ids, mask, scored))
    length = int(mask.sum(1).max())
    ids, mask, scored = ids[:, :length], mask[:, :length], scored[:, :length]
    return {
        "input_ids": torch.where(mask.bool(), ids, pad),
        "attention_mask": mask,
        "labels": torch.where(scored.bool(), ids, -100),
    }


class Source(IntEnum):
    """Also the row of the source in `gkd.training.metrics.SourceMetrics`."""

    ON_POLICY = 0
    TEACHER = 1
    DATASET = 2

    @property
    def label(self) -> str:
        return self.name.lower()


Batch = dict[str, torch.Tensor]

# What a batch holds for each of its scored tokens, and not for each row.
PER_TOKEN = ("scored", "topk", "teacher_hidden")


def scored_positions(labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, L) -> flat positions (N,) that predict a scored token: position i predicts token i + 1."""
    scored = torch.zeros_like(labels, dtype=torch.bool)
    scored[:, :-1] = labels[:, 1:] != IGNORE
    return scored.flatten().nonzero()[:, 0]


def unpadded_rows(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """(B, L) ids and mask -> the ids of each row without padding."""
    return [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu().bool(), strict=True)]
