"""What somebody may send that would run code, and how the commands refuse it."""

import os

import pytest
from commands import ANSWERS

FAST = (
    "--max_new_tokens 8 --max_length 200 --per_device_train_batch_size 1 --logging_steps 1 --disable_tqdm True".split()
)
FAST += "--lmbda 0 --report_to none --preflight off".split()


def command(saved, out, *flags, student="student", teacher="teacher"):
    models = ["--model_name_or_path", saved / student, "--teacher_model_name_or_path", saved / teacher]
    return [str(w) for w in (*models, "--dataset_name", ANSWERS, "--output_dir", out, *FAST, *flags)]


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refusal(call, *args):
    """The message with which an entry point ends, instead of a traceback."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    assert stop.value.code != 0
    return str(stop.value)
