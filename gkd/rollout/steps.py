"""The optimizer steps of a run: the source of each one's text, its batches, and what a checkpoint keeps of them.

The draws are counter-based: a function of (seed, step) alone, without generator state. So every rank draws the same, a
resumed run draws what the interrupted one would have drawn, and no other use of random numbers shifts the draws.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gkd.data.batch import Batch, Source
from gkd.generation.sampling import SOURCE_STREAM


def draw_source(seed: int, step: int, lmbda: float, seq_kd: bool) -> Source:
    """Algorithm 1 of arXiv 2306.13649, once per optimizer step: on-policy with probability `lmbda`.

    Deviation from the paper (4): the draw is per optimizer step and not per micro-batch, so that all micro-batches of
    a step can be generated at once.
    """
    uniform = np.random.Generator(np.random.Philox(key=[seed, SOURCE_STREAM], counter=step)).random()  # in [0, 1)
    if uniform < lmbda:
        return Source.ON_POLICY
    return Source.TEACHER if seq_kd else Source.DATASET


@dataclass
class StepText:
    """The micro-batches of one optimizer step on one rank."""

    source: Source
    batches: list[Batch]
    completions: int
    truncated: torch.Tensor | int  # completions that reached a length limit
    empty: torch.Tensor | int = 0  # completions that are only a stop token
    losses: list[torch.Tensor] = field(default_factory=list)  # of the micro-batches trained on so far

    @property
    def rows(self) -> int:
        return sum(batch.rows for batch in self.batches)

    @property
    def scored_tokens(self) -> int:
        return sum(len(batch.scored) for batch in self.batches)


@dataclass
class PlannedStep:
    """A step whose rows are read and whose source is drawn."""

    source: Source
    collated: list[dict[str, torch.Tensor]]  # its micro-batches' rows, from `gkd.data.batch.GKDCollator`
    cached: list[list[int] | None] = field(
        default_factory=list
    )  # the teacher's text of each prompt that the cache has
    text: StepText | None = None  # set when it is written


def _file(checkpoint: str | Path, rank: int) -> Path:
    return Path(checkpoint, "pending_text", f"rank-{rank}.safetensors")


def save_pending(checkpoint: str | Path, pending: dict[int, StepText], rank: int, ranks: int) -> None:
    """Writes one rank's text, by step, on which a resumed run trains too; no file if there is none."""
    if not pending:
        return
    tensors, steps = {}, {}
    for step, text in pending.items():
        for index, batch in enumerate(text.batches):
            tensors |= {f"{step}.{index}.{name}": batch[name].contiguous() for name in batch}
        counts = {"completions": text.completions, "truncated": int(text.truncated), "empty": int(text.empty)}
        steps[str(step)] = {"source": text.source.label, "batches": len(text.batches), **counts}
    path = _file(checkpoint, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"steps": json.dumps(steps), "ranks": str(ranks)})


def load_pending(checkpoint: str | Path, rank: int, ranks: int, device: torch.device) -> dict[int, StepText]:
    """What `save_pending` wrote for this rank; nothing if it was written by another number of ranks."""
    path = _file(checkpoint, rank)
    if not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if int(metadata["ranks"]) != ranks:
            return {}
        columns: dict[tuple[str, str], dict[str, torch.Tensor]] = defaultdict(dict)  # by step and micro-batch
        for name in file.keys():  # noqa: SIM118
            step, index, column = name.split(".")
            columns[step, index][column] = file.get_tensor(name).to(device)
    pending = {}
    for step, noted in json.loads(metadata["steps"]).items():
        batches = [Batch(**columns[step, str(index)]) for index in range(noted.pop("batches"))]
        pending[int(step)] = StepText(Source[noted.pop("source").upper()], batches, **noted)
    return pending
