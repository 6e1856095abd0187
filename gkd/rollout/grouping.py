"""The rows of an optimizer step, cut by length into micro-batches of a limited number of tokens.

Rows end anywhere, and a micro-batch is as wide as its longest: with rows as they come almost half of it is padding. The loss
divides by the step's tokens on all ranks, so which rows share a micro-batch changes no gradient.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from gkd.data.batch import IGNORE, PER_TOKEN, Batch
from gkd.losses.topk import TopK


def cut(
    lengths: Sequence[int], most_tokens: int, *, overhead: int = 512, at_least: int = 1, most_rows: int | None = None
) -> list[list[int]]:
    """Groups of rows, longest first, with the least padding and overhead; rows × longest of a group is at most `most_tokens`.

    Args:
        lengths: of each row, in tokens. A row longer than `most_tokens` stands alone.
        overhead: the fixed cost of a micro-batch, in tokens.
        at_least: how many groups, as far as there are rows: ranks need the same number.
        most_rows: of a group.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    widths = np.asarray(lengths)[order]
    cost, start = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=int)
    for end in range(1, len(order) + 1):  # the cheapest cut of the first `end` rows
        first = np.arange(end)
        size = (end - first) * widths[:end]
        fits = (size <= most_tokens) & (end - first <= (most_rows or end))
        total = np.where(fits | (first == end - 1), cost[:end] + size + overhead, np.inf)
        start[end] = total.argmin()
        cost[end] = total[start[end]]
    groups, end = [], len(order)
    while end:
        groups.append(order[start[end] : end].tolist())
        end = start[end]
    return _halved(groups[::-1], lengths, at_least)


def _halved(groups: list[list[int]], lengths: Sequence[int], at_least: int) -> list[list[int]]:
    """`at_least` groups, as far as there are rows: the largest are halved, which makes none larger."""
    while len(groups) < min(at_least, len(lengths)):

        def size(i: int) -> tuple[bool, int]:
            return len(groups[i]) > 1, len(groups[i]) * max(lengths[row] for row in groups[i])

        largest = max(range(len(groups)), key=size)
        rows = groups[largest]
        groups[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return groups


def deal(lengths: Sequence[int], groups: int, most_rows: int | None = None) -> list[list[int]]:
    """Rows of each group, in rising order: the longest first, each to the group with the fewest tokens so far.

    Every group gets a row, as far as there are rows. The result depends on the arguments alone.

    Args:
        most_rows: of a group; there must be groups enough.
    """
    dealt: list[list[int]] = [[] for _ in range(groups)]
    tokens = [(0, 0, group) for group in range(groups)]  # and rows, of each group
    for row in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        total, rows, group = min(part for part in tokens if part[1] < (most_rows or len(lengths)))
        dealt[group].append(row)
        tokens[group] = total + lengths[row], rows + 1, group
    return [sorted(rows) for rows in dealt]


def share(
    lengths: Sequence[int], most_tokens: int, *, at_least: int = 1, most_rows: int | None = None
) -> list[list[int]]:
    """Groups of about as many tokens each, for rows that need no padding: as few groups as `most_tokens` allows.

    Arguments are those of `cut`; a group's tokens are at most `most_tokens`.
    """
    rows = len(lengths)

    def dealt(number: int) -> list[list[int]] | None:
        groups = deal(lengths, number, most_rows)
        fits = number == rows or max(sum(lengths[row] for row in group) for group in groups) <= most_tokens
        return groups if fits else None

    fewest = min(rows, max(-(-sum(lengths) // most_tokens), -(-rows // (most_rows or rows))))
    groups = next(filter(None, map(dealt, range(fewest, rows + 1))))
    if len(groups) >= at_least:
        return groups
    # Dealing to more groups may give one of them more tokens, but other ranks wait for exactly so many.
    return dealt(min(at_least, rows)) or _halved(groups, lengths, at_least)


class StepRows:
    """The rows of a step on this rank, from micro-batches that still have their masks.

    Attributes:
        whole: one batch of all rows.
        lengths: tokens of each row, up to the last that is not padding: of the student's text or the teacher's, if longer.
    """

    def __init__(self, batches: list[Batch], pad: int):
        if any("teacher_input_ids" in batch for batch in batches):  # the student's, where a teacher reads nothing else
            names = "teacher_input_ids", "teacher_attention_mask", "teacher_scored"
            batches = [replace(batch, **dict(zip(names, batch.teacher_inputs, strict=True))) for batch in batches]
        self.whole, self.pad = _joined(batches, pad), pad
        self._lengths, self._right_padded = {}, {}  # of the student's and the teacher's text
        for prefix in ("", "teacher_"):
            if (ids := getattr(self.whole, f"{prefix}input_ids")) is not None:
                mask = getattr(self.whole, f"{prefix}attention_mask")
                columns = torch.arange(1, ids.shape[1] + 1, device=ids.device)
                used = columns.expand_as(ids) if mask is None else mask.bool() * columns
                self._lengths[prefix] = used.amax(1).tolist()
                self._right_padded[prefix] = mask is None or bool((mask[:, :-1] >= mask[:, 1:]).all())
        self.lengths = [max(both) for both in zip(*self._lengths.values(), strict=True)]

    def batches(self, groups: list[list[int]]) -> list[Batch]:
        """A batch of each group of rows, with its `lengths`, and no mask, where all padding stands on the right."""
        whole = self.whole
        rows_of_tokens = (whole.scored // whole.input_ids.shape[1]).cpu().numpy()
        ends = np.searchsorted(rows_of_tokens, np.arange(whole.rows + 1))  # of each row's scored tokens
        return [self._batch(rows, ends) for rows in groups]

    def _batch(self, rows: list[int], ends: np.ndarray) -> Batch:
        whole, device = self.whole, self.whole.input_ids.device
        tokens = np.concatenate([np.arange(ends[row], ends[row + 1]) for row in rows])
        moves = np.repeat(np.arange(len(rows)) - rows, [ends[row + 1] - ends[row] for row in rows])  # of a token's row
        at, tokens, moves = (torch.from_numpy(np.asarray(part)).to(device) for part in (rows, tokens, moves))
        fields = {name: whole[name][tokens if name in PER_TOKEN else at] for name in whole}
        for prefix, lengths in self._lengths.items():
            width, before = max(lengths[row] for row in rows), fields[f"{prefix}input_ids"].shape[1]
            scored = fields[f"{prefix}scored"]
            fields[f"{prefix}scored"] = (scored // before + moves) * width + scored % before
            for name in ("input_ids", "labels", "attention_mask"):
                if prefix + name in fields:
                    fields[prefix + name] = fields[prefix + name][:, :width]
            if self._right_padded[prefix]:
                fields[prefix + "attention_mask"] = None
                fields[prefix + "lengths"] = torch.tensor([lengths[row] for row in rows])
        return Batch(**fields)


def _joined(batches: list[Batch], pad: int) -> Batch:
    """One batch of all rows, as wide as the widest."""
    fill = {"labels": IGNORE, "attention_mask": 0, "teacher_attention_mask": 0}
    if any("aligned" in batch for batch in batches):
        fill["teacher_input_ids"] = 0  # the student's id of padding may be none of the teacher's
    fields = {}
    for name in dict.fromkeys(name for batch in batches for name in batch):
        if missing := [batch for batch in batches if name not in batch]:
            raise ValueError(f"{len(missing)} of a step's {len(batches)} batches have no {name}: all must, or none.")
        parts = [batch[name] for batch in batches]
        if isinstance(parts[0], TopK):
            fields[name] = TopK.joined(parts)
        elif name in PER_TOKEN and name.endswith("scored"):
            ids = [batch["input_ids" if name == "scored" else "teacher_input_ids"] for batch in batches]
            width, before = max(part.shape[1] for part in ids), np.cumsum([0, *(len(part) for part in ids)])
            moved = zip(parts, ids, before, strict=False)
            fields[name] = torch.cat([(s // i.shape[1] + int(n)) * width + s % i.shape[1] for s, i, n in moved])
        elif name in PER_TOKEN:
            fields[name] = torch.cat(parts)
        else:
            width = max(part.shape[1] for part in parts)
            value = fill.get(name, pad)
            fields[name] = torch.cat([F.pad(part, (0, width - part.shape[1]), value=value) for part in parts])
    return Batch(**fields)
