"""Started by test_compat.py: trains with a TRL of the future, which is newer and without its GKDTrainer.

python tests/workers/future_trl_worker.py FOLDER    prints GKDConfig's fields and the figures of the training, as JSON
"""

import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path

if __name__ == "__main__":  # before gkd is imported
    real = importlib.metadata.version
    importlib.metadata.version = lambda name: "99.1.0" if name == "trl" else real(name)
    sys.modules["trl.experimental.gkd"] = None

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch
from tiny import make_model
from trainers import losses, tiny_trainer

from gkd import compat


def fields_of_gkd_config() -> dict:
    beyond_sft = compat.GKDConfig.__annotations__
    return {f.name: f.default for f in dataclasses.fields(compat.GKDConfig) if f.name in beyond_sft}


def train_two_steps(folder) -> list[float]:
    """The losses, and a sum over the final weights."""
    flags = {"max_steps": 2, "max_length": 64, "lmbda": 1.0, "learning_rate": 0.01, "gradient_checkpointing": True}
    trainer = tiny_trainer(folder, make_model(0), make_model(1), **flags)
    trainer.train()
    return [*losses(trainer), sum(p.double().sum() for p in trainer.model.parameters()).item()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert compat.StockGKDTrainer is compat.SFTTrainer
    print(json.dumps([fields_of_gkd_config(), train_two_steps(sys.argv[1])]))
