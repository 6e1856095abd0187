"""Started by test_teacher_cache.py under torchrun: a caching on two ranks, then a step of training from it.

torchrun --nproc_per_node 2 tests/workers/cache_worker.py OUT FLAGS-OF-CACHE_TEACHER
"""

import os
import sys
from pathlib import Path
from unittest.mock import patch

REPO = Path(__file__).parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import torch
from accelerate import Accelerator, PartialState
from tiny import make_model
from trainers import tiny_trainer

import cache_teacher
from gkd.teachers.cache import TeacherCache


def trainer_of(out, cache=None, rows=None, student=None, **options):
    options = {
        "gradient_accumulation_steps": 2,
        "beta": 0.5,
        "max_new_tokens": 8,
        "max_length": 200,
    } | options
    teacher = make_model(1, hidden_size=48) if cache is None else None
    student = make_model(0) if student is None else student
    return tiny_trainer(out, student, teacher, rows, more={"teacher_cache": cache}, **options)


def one_step(trainer):
    """Loss and gradients of a step."""
    grads, create = {}, trainer.create_optimizer

    def watched(*args, **kwargs):
        optimizer = create(*args, **kwargs)
        optimizer.register_step_pre_hook(
            lambda *a: grads.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
        )
        return optimizer

    trainer.create_optimizer = watched
    trainer.train()
    return trainer.state.log_history[0], grads


def main(out: str, *words: str) -> None:
    # The process group stays: a second one of the same name finds the addresses of the first in the launcher's store.
    with patch.object(Accelerator, "end_training"):
        cache_teacher.main(list(words))
    PartialState().wait_for_everyone()  # until the first rank has finished the cache
    cache = TeacherCache(str(Path(out, "cache")))
    options = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    log, grads = one_step(trainer_of(Path(out, "run"), cache, **options))
    if os.environ["RANK"] == "0":
        torch.save({"loss": log["loss"], "grads": grads}, Path(out, "grads.pt"))
    os._exit(0)  # see ranks_worker.py


if __name__ == "__main__":
    main(*sys.argv[1:])
