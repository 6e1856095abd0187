"""Started by test_stability.py under torchrun: one rank's loss is NaN at step 2, then at each step of a second run.

torchrun --nproc_per_node 2 tests/workers/nan_worker.py FOLDER ddp|zero2|zero3
"""

import json
import os
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import torch
from tiny import make_model
from trainers import TWELVE_ROWS, tiny_trainer

from gkd.io.errors import RunStopped
from gkd.losses.objective import Objective


def run(folder: Path, wrapper: str, bad: set[int], **options) -> dict:
    loss = Objective.loss

    def spoiled(*args, **kwargs):
        total, statistics = loss(*args, **kwargs)
        if trainer.args.process_index == 1 and trainer.state.global_step + 1 in bad:
            total = total * torch.nan
        return total, statistics

    trainer = tiny_trainer(
        folder,
        make_model(0),
        make_model(1),
        TWELVE_ROWS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=wrapper == "ddp",  # with it accelerate would leave DeepSpeed out
        deepspeed=None if wrapper == "ddp" else str(REPO / f"ds_configs/{wrapper}.json"),
        **options,
    )
    Objective.loss, stopped = spoiled, None
    try:
        trainer.train()
    except RunStopped as error:
        stopped = str(error)
    Objective.loss = loss
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {"losses": [log["loss"] for log in logs], "skipped": [log.get("skipped_steps", 0) for log in logs], "stopped": stopped}  # fmt: skip


def main(folder: str, wrapper: str) -> None:
    if wrapper != "ddp":
        os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        os.environ.pop("ACCELERATE_USE_CPU", None)
    found = [
        run(Path(folder, "once"), wrapper, {2}, max_steps=3),
        run(Path(folder, "always"), wrapper, set(range(9)), max_steps=9, max_skipped_steps=3),
    ]
    Path(folder, f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))
    os._exit(0)  # see ranks_worker.py


if __name__ == "__main__":
    main(*sys.argv[1:])
