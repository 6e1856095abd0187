"""Started by test_choices.py under torchrun: rank 1 has no memory to generate more than one row at a time.

torchrun --nproc_per_node 2 tests/workers/choices_worker.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import torch
from tiny import make_model
from trainers import TWELVE_ROWS, losses, tiny_trainer

from gkd.generation import generator
from gkd.runs.choices import NAME, Choices

RANK = int(os.environ["RANK"])
generate, rows = generator.generate_dynamic, []


def narrow_generate(model, prompts, *args):
    rows.append(len(prompts))
    if RANK == 1 and len(prompts) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return generate(model, prompts, *args)


def train(folder: Path, checkpoint: Path | None = None) -> list[float]:
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    options = {"lmbda": 1.0, "per_device_train_batch_size": 4} | steps
    trainer = tiny_trainer(folder, make_model(0), make_model(1), TWELVE_ROWS, **options)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return losses(trainer)


def main(folder: Path) -> None:
    found = {"expected": train(folder / "whole")}
    generator.generate_dynamic = narrow_generate
    found |= {"losses": train(folder / "short"), "rows": rows.copy()}
    rows.clear()
    found |= {"again": train(folder / "again", folder / "short/checkpoint-2")[-2:], "resumed": rows}
    if RANK == 0:
        (folder / "damaged").mkdir()
        (folder / "damaged" / NAME).write_text("{")
    try:
        Choices().resume(folder / "damaged")
    except ValueError as error:
        found["refused"] = str(error)
    (folder / f"found-{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    os._exit(0)  # see ranks_worker.py
