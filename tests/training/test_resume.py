"""A run that crashes and is resumed trains on the same text, to the same losses, to the same weights: bit by bit."""

import json
import random
import sys

import pytest
from preloaded import run as run_preloaded
from preloaded import run_ranks, start
from progress import run as run_command
from progress import wait_until
from tiny import REPO

from gkd.rollout.steps import draw_source

WORKER = str(REPO / "tests/workers/resume_worker.py")
CASES = {
    "λ 0, teacher": {"lmbda": 0.0, "seq_kd": True},
    "λ 0.5, dataset": {"lmbda": 0.5, "seq_kd": False},
    "λ 1": {"lmbda": 1.0, "seq_kd": False},
}
MORE = {
    "λ 0, dataset": {"lmbda": 0.0, "seq_kd": False},
    "λ 0.5, teacher": {"lmbda": 0.5, "seq_kd": True},
    "3 steps a generation": {"lmbda": 0.5, "seq_kd": True, "steps_per_generation": 3},
    "read ahead by the student": {"lmbda": 0.5, "seq_kd": True, "steps_per_generation": 4, "generation_batch_size": 2},
    "full, no accumulation": {"lmbda": 0.5, "seq_kd": True, "lora": False, "gradient_accumulation_steps": 1},
    "no cache": {"lmbda": 0.5, "seq_kd": True, "teacher_text_cache": "off"},
}
TWO_RANKS = {
    "3 steps a generation": MORE["3 steps a generation"],
    "auto": {
        "lmbda": "auto",
        "lmbda_probe_steps": 3,
        "rollout_guard": "on",
        "seq_kd": True,
        "per_device_eval_batch_size": 8,
        "num_train_epochs": 4,
    },
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, ranks):
    cases = CASES | (MORE if ranks == 1 else TWO_RANKS)
    done = run_ranks([WORKER, "matrix", tmp_path, json.dumps(cases)], ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    sources = []
    for rank in range(ranks):
        found = json.loads((tmp_path / f"matrix-{rank}.json").read_text())
        print(json.dumps(found, indent=1, ensure_ascii=False))
        assert found.keys() == cases.keys()
        for case, result in found.items():
            assert result["moved"], case
            assert (result["differ"], result["logs"], result["weights"]) == ([], True, True), (case, rank, result)
        sources.append({case: result["sources"] for case, result in found.items()})
    assert all(of_rank == sources[0] for of_rank in sources)
    if ranks == 2:  # decided by the first rank's clock
        half = [draw_source(42, step, 0.5, seq_kd=True).label for step in range(8, 12)]  # with the default seed
        assert sources[0]["auto"] == (["teacher"] * 2 + ["on_policy"]) * 2 + ["teacher"] * 2 + half


def steps_in(trace):
    return int(json.loads(trace.read_text().splitlines()[-1])[0]) if trace.is_file() else 0


def test_killed_again_and_again(tmp_path):
    """SIGKILL at random moments: each start goes on from the last whole checkpoint, and the end is the same.

    The first start shares nothing with the others, not even the order of Python's sets.
    """
    options = json.dumps({"lmbda": 0.5, "seq_kd": True, "num_train_epochs": 4})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_command([sys.executable, WORKER, "run", str(whole), options], check=True)
    trace, done = killed / "trace-0.jsonl", 0
    for _ in range(3):
        process = start([WORKER, "run", killed, options])
        aim = done + random.randint(3, 7)
        wait_until(lambda aim=aim: steps_in(trace) >= aim, process)
        done = steps_in(trace)
        process.kill()
        process.wait()
        done = max(done - 2, 0)  # a checkpoint each 2 steps
    run_preloaded([WORKER, "run", killed, options], check=True)
    assert (killed / "final.safetensors").read_bytes() == (whole / "final.safetensors").read_bytes()
