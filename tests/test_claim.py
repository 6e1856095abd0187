"""experiments/claim.sh: its task, a run that is killed and goes on, and its tables."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO))
from experiments.claim import tables, tasks

FAST = "--max_steps 2 --bf16 False --per_device_train_batch_size 2 --max_new_tokens 8 --logging_steps 1"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three rows of each task and set."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "SHARES", dict.fromkeys(tasks.SHARES, 3))
        patch.setattr(sys, "argv", ["tasks.py", str(folder)])
        tasks.main()
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_worked_answers_are_right_and_sets_are_apart(data):
    sets = {name: rows(data / f"{name}.jsonl") for name in ("train", "held_out", "teacher/train", "prompts")}
    questions = {name: {row.get("prompt", row.get("messages"))[0]["content"] for row in rows} for name, rows in sets.items()}  # fmt: skip
    assert all(len(found) == 3 * len(tasks.TASKS) for found in questions.values())
    assert questions["prompts"] == questions["train"]
    assert not questions["train"] & questions["held_out"]
    assert not questions["teacher/train"] & (questions["train"] | questions["held_out"])
    assert all(row["messages"][-1]["content"] == "" for row in sets["prompts"])
    assert {json.loads(row["metadata"])["source_dataset"] for row in sets["held_out"]} == set(tasks.TASKS)
    for row in sets["train"] + sets["held_out"]:
        worked = row["completion"][0]["content"]
        assert tasks.solved(worked, row) == 1.0
        assert tasks.solved(worked.replace("<answer>", "<answer>7"), row) == 0.0
        assert tasks.solved(row["answer"], row) == 0.0  # without the tags


@pytest.mark.parametrize(
    ("task", "metadata", "steps"),
    [
        ("chain_sum", {"expression": "7 - 9 + 12"}, ["7 - 9 = -2", "-2 + 12 = 10"]),
        ("products", {"expression": "34 * 27"}, ["34 * 20 = 680", "34 * 7 = 238", "680 + 238 = 918"]),
        ("products", {"expression": "34 * 7"}, ["34 * 7 = 238"]),
        ("gcd", {"numbers": [12, 18]}, ["18 % 12 = 6", "12 % 6 = 0"]),
        ("leg_counting", {"animals": {"snake": 2, "dog": 3}}, ["snake: 2 * 0 = 0, 0 + 0 = 0", "dog: 3 * 4 = 12, 0 + 12 = 12"]),
        ("spell_backward", {"word": "sun"}, ["s u n", "n u s"]),
        ("letter_counting", {"span": ["egg", "gig"], "target_letter": "g"}, ["e g g: 2", "g i g: 4"]),
    ],
)  # fmt: skip
def test_steps(task, metadata, steps):
    assert getattr(tasks, task)(metadata) == steps


def test_claim_goes_on_after_a_kill(saved, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("student", "teacher", "base", "half"):
        (out / name).symlink_to(saved / ("teacher" if name == "teacher" else "student"))
    (out / "data").symlink_to(data)
    cells = tmp_path / "cells.txt"
    cells.write_text(
        f"# name seeds flags\nfirst 1 --lmbda 0 --beta 0 {FAST}\nstock_second 2 --lmbda 1 --beta 0.5 {FAST} --use_cpu\n"
    )
    environment = os.environ | {
        "OUT": str(out),
        "CELLS": str(cells),
        "CUDA_VISIBLE_DEVICES": "",
        "SEEDS": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    script = REPO / "experiments/claim.sh"
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen([script], env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.time() + 240
        while not (out / "logs/stock_second-1.log").exists() and running.poll() is None and time.time() < deadline:
            time.sleep(0.2)
        assert (out / "results/first-1.json").exists(), (tmp_path / "log").read_text()[-2000:]
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    assert not (out / "results/stock_second-1.json").exists()
    stamps = {name: (out / f"results/{name}.json").stat().st_mtime_ns for name in ("start", "first-1")}
    done = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=240)
    logs = "".join(path.read_text()[-2000:] for path in (out / "logs").iterdir())
    assert done.returncode == 0, done.stdout + done.stderr[-2000:] + logs
    assert {name: (out / f"results/{name}.json").stat().st_mtime_ns for name in stamps} == stamps
    assert "first-1: started" not in done.stdout
    assert not (out / "results/stock_second-2.json").exists()  # SEEDS
    for name, last in (("first", 2), ("stock_second", 2)):
        found = json.loads((out / f"results/{name}-1.json").read_text())
        assert found["steps"] == found["curve"][-1]["step"] == last
        assert found["sampled"]["rows"] == found["greedy"]["rows"] == 3 * len(tasks.TASKS)
        assert found["seconds_per_step"] > 0
        assert found["curve"][-1]["forward_kl"] > 0
    assert (out / "results/curves.png").stat().st_size > 0
    assert "`stock_second`" not in done.stdout.split("peer")[0]


def result(name, seed, solved, flags, curve=(), **more):
    """A cell's file; `solved` as a string of bits."""
    measured = {"rows": len(solved), "solved": f"{int(solved, 2):x}", "accuracy": solved.count("1") / len(solved)}
    measured |= {"entropy": 0.5, "forward_kl": 0.25, "length": 3.0, "tasks": {"gcd": measured["accuracy"]}}
    points = [{"step": step, "accuracy": accuracy} for step, accuracy in curve]
    return {"cell": name, "seed": seed, "flags": flags, "jobs": 1, "steps": 300, "seconds_per_step": 0.5, "curve": points,
            "sampled": measured, "greedy": measured, "training": []} | more  # fmt: skip


def test_tables_by_hand(tmp_path):
    start = result("", 0, "0000000011", "")
    files = {"start": {"student": start, "teacher": result("", 0, "1111111110", "")}}
    for found in (
        result("supervised_forward", 1, "0000000111", "--lmbda 0 --beta 0"),
        result("supervised_forward", 2, "0000001111", "--lmbda 0 --beta 0"),
        result("on_policy_jsd", 1, "0000111111", "--lmbda 1 --beta 0.5", seconds_per_step=1.5),
        result("stock_100", 1, "0000011111", "--lmbda 1", [(50, 0.3), (100, 0.5)], steps=100, seconds_per_step=6.0),
        result("gkd_100", 1, "0000111111", "--lmbda 1", [(50, 0.5), (100, 0.6)], steps=100, seconds_per_step=1.5),
    ):
        files[f"{found['cell']}-{found['seed']}"] = found
    for name, found in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    made = tables.all_tables(tmp_path)
    steps = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")] for line in made["steps"].splitlines()}
    assert steps["`supervised_forward`"][3:5] == ["2", "35.0"]
    assert steps["`supervised_forward`"][5].startswith("+15.0 [")
    assert steps["`on_policy_jsd`"][5].startswith("+40.0 [")
    assert steps["teacher"][4] == "90.0"
    start, cells = tables.load(tmp_path)
    gains = cells["on_policy_jsd"].gains("sampled")
    assert gains.mean() == pytest.approx(0.4, abs=0.02)
    assert gains.std() == pytest.approx((0.4 * 0.6 / 10) ** 0.5, abs=0.02)  # binomial, over rows
    assert "gkd_100" not in made["steps"]
    seconds = {line.split("|")[1].strip(): line for line in made["seconds"].splitlines()}
    assert "| 300 | 150 |" in seconds["`supervised_forward`"]
    assert "| 300 | 450 |" in seconds["`on_policy_jsd`"]
    peer = {line.split("|")[1].strip(): line for line in made["peer"].splitlines()}
    assert "| 100 steps, 600 s | 3.0 |" in peer["`stock_100`"]  # 30 points in 10 minutes
    assert "| 50 steps, 75 s | 16.0 |" in peer["`gkd_100`"]
