"""Started by test_teacher_cache.py under torchrun: a caching on two ranks, then a step of training from it.

torchrun --nproc_per_node 2 tests/workers/cache_worker.py OUT FLAGS-OF-CACHE_TEACHER
"""

import os
import sys
from pathlib import Path
from unittest.mock import patch

REPO = Path(__file__).parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests"), str(REPO / "tests/teachers")]

import torch
from accelerate import Accelerator, PartialState
from test_teacher_cache import one_step, trainer_of

import cache_teacher
from gkd.teachers.cache import TeacherCache


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
