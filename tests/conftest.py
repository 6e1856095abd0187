"""Tiny models and a tokenizer, built in the process: no test needs a network."""

import functools
import gc
import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock, patch

gc.disable()  # until all is imported: each search for garbage takes tenths of a second then, and finds none
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["ACCELERATE_USE_CPU"] = "true"
# The commands that tests start keep the names of their flags here; what libraries keep stays where it was.
os.environ.setdefault("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
_CACHE = tempfile.TemporaryDirectory(prefix="gkd-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import pytest
import torch

pytest.register_assert_rewrite("hostile", "preloaded", "progress", "ranks", "vllm_engines")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: the kernel runs on the CPU
import quick  # noqa: F401
from datasets import Dataset
from tiny import ROWS, make_model, make_tokenizer, save_pair

from gkd.report import curves

torch.set_num_threads(1)


# Files that take longest. They go first, since two workers take whole files: the last one to end decides.
LONGEST = (
    *("test_resume.py", "test_benchmarks.py", "test_train_gkd.py", "test_evaluation.py", "test_wheel.py"),
    *("test_experiments.py", "test_report.py", "test_faults.py", "test_multinode.py", "test_start.py"),
    *("test_families.py", "test_remote.py", "test_logprobs.py", "test_fused_step.py", "test_cross_tokenizer.py"),
)


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist's own order has files of few tests last, and those are the longest


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish():
    gc.freeze()  # libraries stay: each training looks for garbage at its end, and need not look at them
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def pictures(request):
    """Reports have empty pictures, but in tests of reports: drawing takes most of a short run. `with pictures():` draws."""
    draw = {"_new_axes": curves._new_axes, "_svg": curves._svg}
    empty = '<svg xmlns="http://www.w3.org/2000/svg"/>'
    stand_ins = {"_new_axes": lambda *_, **__: MagicMock(), "_svg": lambda *_: empty}
    with patch.multiple(curves, **(draw if request.path.name == "test_report.py" else stand_ins)):
        yield functools.partial(patch.multiple, curves, **draw)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def student():
    return make_model(seed=0)


@pytest.fixture
def teacher():
    return make_model(seed=1, hidden_size=48)


@pytest.fixture
def rows():
    return Dataset.from_list(ROWS)


@pytest.fixture(scope="session")
def saved(tmp_path_factory, tokenizer):
    """Folder with `student` and `teacher`, as a user has them."""
    folder = tmp_path_factory.mktemp("models")
    save_pair(folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def checkpoint(saved, tmp_path_factory):
    """A run of one step with its checkpoint, which tests copy."""
    from hostile import command

    import train_gkd

    out = tmp_path_factory.mktemp("run") / "run"
    train_gkd.main(command(saved, out, "--max_steps", "1", "--save_steps", "1"))
    return out / "checkpoint-1"


@pytest.fixture
def train(tmp_path, tokenizer, rows):
    """Trains a step or more with `GKDTrainer`, on `rows` unless told otherwise, and gives the trainer back."""
    from trainers import tiny_trainer

    from gkd.training.trainer import GKDTrainer

    def make(
        student, teacher=None, trainer_class=GKDTrainer, train_dataset=rows, peft_config=None, run=True, **options
    ):
        teacher = make_model(1) if teacher is None else teacher
        options = {"max_length": 64, "max_grad_norm": 1e9} | options
        more = {"processing_class": tokenizer, "peft_config": peft_config}
        trainer = tiny_trainer(
            tmp_path / "out", student, teacher, train_dataset, cls=trainer_class, more=more, **options
        )
        if run:
            trainer.train()
        return trainer

    return make
