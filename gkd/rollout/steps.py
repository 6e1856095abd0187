"""The steps of a run: who writes the text of each, the batches that it becomes, and what is kept of it with a checkpoint.

The draws are counter-based: a function of (seed, step) alone, with no generator state. So every rank draws the same,
a resumed run repeats what the interrupted one would have drawn, and nothing else that uses random numbers can shift it.
"""

import json
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
    """The micro-batches of one optimizer step on one rank.

    Of its `completions`, `truncated` ran into a length limit, and `empty` are a stop token alone. `losses` are those of
    the micro-batches that have been trained on.
    """

    source: Source
    batches: list[Batch]
    completions: int
    truncated: torch.Tensor | int
    empty: torch.Tensor | int = 0
    losses: list[torch.Tensor] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(batch.rows for batch in self.batches)

    @property
    def scored_tokens(self) -> int:
        return sum(len(batch.scored) for batch in self.batches)


@dataclass
class PlannedStep:
    """A step whose rows have been read and whose source is drawn; `text` follows when it is written.

    Attributes:
        collated: the rows of its micro-batches, as `gkd.data.batch.GKDCollator` makes them.
        cached: of a step whose text the teacher is to write, what the cache has for each prompt, or None.
    """

    source: Source
    collated: list[dict[str, torch.Tensor]]
    cached: list[list[int] | None] = field(default_factory=list)
    text: StepText | None = None


# Text that was written ahead of its step, kept with a checkpoint: a resumed run trains on the same.
FOLDER = "pending_text"


def _file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / FOLDER / f"rank-{rank}.safetensors"


def save_pending(checkpoint: str | Path, pending: dict[int, StepText], rank: int, ranks: int) -> None:
    """Writes one rank's text by the step that it is for; nothing where there is none."""
    if not pending:
        return
    tensors, steps = {}, {}
    for step, text in pending.items():
        for index, batch in enumerate(text.batches):
            tensors |= {f"{step}.{index}.{name}": batch[name].contiguous() for name in batch}
        counts = {"completions": text.completions, "truncated": int(text.truncated), "empty": int(text.empty)}
        steps[str(step)] = {"source": text.source.label, "batches": len(text.batches), **counts}
    path = _file(Path(checkpoint), rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"steps": json.dumps(steps), "ranks": str(ranks)})


def load_pending(checkpoint: str | Path, rank: int, ranks: int, device: torch.device) -> dict[int, StepText]:
    """What `save_pending` wrote for this rank; nothing if that run had another number of ranks."""
    path = _file(Path(checkpoint), rank)
    if not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if int(metadata["ranks"]) != ranks:
            return {}
        tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
    pending = {}
    for step, noted in json.loads(metadata["steps"]).items():
        columns: list[dict[str, torch.Tensor]] = [{} for _ in range(noted.pop("batches"))]
        for name, tensor in tensors.items():
            its_step, index, column = name.split(".")
            if its_step == step:
                columns[int(index)][column] = tensor
        batches = [Batch(**tensors_of) for tensors_of in columns]
        pending[int(step)] = StepText(Source[noted.pop("source").upper()], batches, **noted)
    return pending
