"""The rows of an optimizer step, dealt to the ranks so that all train on about the same number of tokens.

Ranks wait for the one with the most tokens. The loss divides by the step's tokens on all ranks, so which rank trains on a
row changes no gradient.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from gkd.data.batch import IGNORE, Batch
from gkd.rollout.grouping import StepRows, deal

# Rows stay where they are if the fullest rank has at most so many times the mean: moving them would gain less than it costs.
_EVEN = 1.03
# Fields that move, and what fills their rows up; None is the id of padding.
_FIELDS = {"input_ids": None, "labels": IGNORE, "attention_mask": 0, "scored": -1}
_TEACHER_FIELDS = {f"teacher_{name}": fill for name, fill in _FIELDS.items() if name != "labels"}


def dealt_rows(rows: StepRows, accelerator: Accelerator, longest: int) -> tuple[StepRows, int]:
    """This rank's rows of a step after dealing, and the `longest` of all ranks. Collective.

    Returns its arguments, on all ranks, where each keeps its rows: where dealing gains little, and where the teacher's output
    is known, which is a hundred times as large as they are.
    """
    whole, device = rows.whole, accelerator.device
    own = {name: _by_row(whole, name) for name in (_FIELDS | _TEACHER_FIELDS)}
    reads_other, stays = whole.teacher_input_ids is not None, any(name not in own for name in whole)
    sizes = [len(rows.lengths), sum(rows.lengths), longest, reads_other, stays]
    sizes += [part.shape[1] for part in own.values()]
    sizes = accelerator.gather(torch.tensor([sizes], device=device)).tolist()  # of each rank
    counts, tokens, longests, reads_other, stays, *widths = zip(*sizes, strict=True)
    if any(stays) or max(tokens) * len(tokens) <= _EVEN * sum(tokens):
        return rows, longest
    fields = _FIELDS | (_TEACHER_FIELDS if any(reads_other) else {})
    widths = dict(zip(own, map(max, widths), strict=True))
    parts = [torch.tensor(rows.lengths, device=whole.input_ids.device)[:, None]]
    for name, fill in fields.items():
        missing = widths[name] - own[name].shape[1]
        parts.append(F.pad(own[name], (0, missing), value=rows.pad if fill is None else fill))
    table = F.pad(torch.cat(parts, 1).int(), (0, 0, 0, max(counts) - counts[accelerator.process_index]))
    every = accelerator.gather(table.to(device))  # (ranks · rows of the fullest, lengths and all fields)
    every = torch.cat([part[:count] for part, count in zip(every.split(max(counts)), counts, strict=True)])
    lengths = every[:, 0].tolist()
    dealt = deal(lengths, len(counts))
    if max(sum(lengths[row] for row in part) for part in dealt) >= max(tokens):
        return rows, longest
    table = every[dealt[accelerator.process_index], 1:].to(whole.input_ids.device).long()
    columns = table.split([widths[name] for name in fields], 1)
    return StepRows([_batch(dict(zip(fields, columns, strict=True)))], rows.pad), max(longests)


def _by_row(batch: Batch, name: str) -> torch.Tensor:
    """A field (B, W), which is the student's where a teacher reads nothing else; of scored positions their columns, or -1."""
    if batch.teacher_input_ids is None:
        name = name.removeprefix("teacher_")
    values, ids = getattr(batch, name), batch["teacher_input_ids" if name.startswith("teacher_") else "input_ids"]
    if values is None:  # a mask
        return torch.ones_like(ids)
    if not name.endswith("scored"):
        return values
    row, column = values // ids.shape[1], values % ids.shape[1]
    counts = torch.bincount(row, minlength=len(ids))
    table = torch.full((len(ids), int(counts.max())), -1, device=ids.device)
    table[row, torch.arange(len(row), device=ids.device) - (counts.cumsum(0) - counts)[row]] = column
    return table


def _batch(fields: dict[str, torch.Tensor]) -> Batch:
    """A batch of fields as `_by_row` returns them."""
    for prefix in ("", "teacher_"):
        if (columns := fields.get(f"{prefix}scored")) is not None:
            rows, width = fields[f"{prefix}input_ids"].shape
            starts = torch.arange(rows, device=columns.device)[:, None] * width
            fields[f"{prefix}scored"] = (columns + starts)[columns >= 0]
    return Batch(**fields)
