"""Which micro-batches of a step a teacher reads in one forward, where each forward first has to gather its weights."""

import torch
import torch.nn.functional as F

from gkd.data.batch import Batch

# Tokens of a forward that reads several micro-batches, padding included: it takes far longer than gathering the weights.
MOST_TOGETHER = 16_384
# Tokens whose forward takes about as long as gathering the weights over NVLink, whatever their size.
_GATHERING = 2048
# Share of the GPU's memory for the hidden states of a step; those of further micro-batches wait in CPU memory.
STATES_SHARE = 0.05


def read_together(batches: list[Batch]) -> list[list[Batch]]:
    """Neighbours that share a forward: of few tokens in all, and with less new padding than gathering costs."""
    forwards: list[list[Batch]] = []
    rows = width = 0  # of the last forward
    for batch in batches:
        more, wide = batch.teacher_inputs[0].shape
        size = (rows + more) * max(width, wide)
        if forwards and size <= MOST_TOGETHER and size - rows * width - more * wide <= _GATHERING:
            forwards[-1].append(batch)
            rows, width = rows + more, max(width, wide)
        else:
            forwards.append([batch])
            rows, width = more, wide
    return forwards


def joined(batches: list[Batch], pad: int) -> Batch:
    """What a teacher reads of several micro-batches, as one."""
    inputs = [batch.teacher_inputs for batch in batches]
    lengths = [batch.lengths_for_teacher for batch in batches]
    width = max(ids.shape[1] for ids, *_ in inputs)
    masked = any(mask is not None for _, mask, _ in inputs)
    parts, start = [], 0
    for ids, mask, scored in inputs:
        more = (0, width - ids.shape[1])
        mask = torch.ones_like(ids) if mask is None else mask
        moved = (scored // ids.shape[1] + start) * width + scored % ids.shape[1]
        parts.append((F.pad(ids, more, value=pad), F.pad(mask, more), moved))
        start += len(ids)
    ids, mask, scored = map(torch.cat, zip(*parts, strict=True))
    known = all(part is not None for part in lengths)
    return Batch(ids, ids, scored, mask if masked else None, lengths=torch.cat(lengths) if known else None)
