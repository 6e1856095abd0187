"""Text that was written ahead of its step, kept with a checkpoint: a resumed run trains on the same."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gkd.sources import Source
from gkd.step_text import StepText

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
            tensors |= {f"{step}.{index}.{name}": tensor.contiguous() for name, tensor in batch.items()}
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
    for step, told in json.loads(metadata["steps"]).items():
        batches: list[dict[str, torch.Tensor]] = [{} for _ in range(told.pop("batches"))]
        for name, tensor in tensors.items():
            its_step, index, column = name.split(".")
            if its_step == step:
                batches[int(index)][column] = tensor
        pending[int(step)] = StepText(Source[told.pop("source").upper()], batches, **told)
    return pending
