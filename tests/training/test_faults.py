"""Signals, locks and rows that are out of the ordinary: what the run does, and what the user sees."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from commands import ANSWERS, command
from preloaded import run_ranks
from progress import finish
from progress import run as run_command
from tiny import REPO
from trainers import TWELVE_ROWS, make_trainer, weights

import train_gkd
from gkd.runs.checkpoints import damage
from gkd.runs.folder import lock
from gkd.training.faults import StopOnSignal

WORKER = str(REPO / "tests/workers/resume_worker.py")


# ---------------------------------------------------------------------- signals


def test_a_signal_saves_and_says_how_to_go_on(saved, tmp_path, monkeypatch):
    """The real command, signalled in mid-run; what it prints is run, and finishes the run."""
    flags = command(saved, ANSWERS, tmp_path / "run", "--lmbda", "0", "--max_steps", "40", "--save_strategy", "no")
    words = [sys.executable, "train_gkd.py", *flags]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    process = subprocess.Popen(words, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "'loss'" in line:
            break
    process.send_signal(signal.SIGTERM)
    out, err = finish(process)
    assert process.returncode == 0, err[-2000:]
    assert "SIGTERM: finishing the step and saving a checkpoint; a second signal stops at once." in err
    step = int(re.search(r"Stopped after step (\d+), which is saved. Go on with:", out)[1])
    assert damage(tmp_path / f"run/checkpoint-{step}") is None
    assert not (tmp_path / "run/model.safetensors").exists()
    typed = out.strip().splitlines()[-1]
    assert typed == shlex.join([*words, "--resume_from_checkpoint", "auto"])
    train_gkd.main(shlex.split(typed)[2:])
    state = json.loads((tmp_path / "run/trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] > step


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_second_signal_stops_at_once(name):
    code = (
        "import os, signal, time\nfrom gkd.training.faults import StopOnSignal\nwith StopOnSignal() as stop:\n"
        f"    for _ in range(2): os.kill(os.getpid(), signal.{name})\n"  # twice within a second is once
        f"    print(stop.name, flush=True)\n    time.sleep(1.1)\n    os.kill(os.getpid(), signal.{name})\n    time.sleep(9)"
    )
    done = run_command([sys.executable, "-c", code], cwd=REPO)
    assert done.returncode == -getattr(signal, name)
    assert done.stdout == f"{name}\n"
    assert "Stopped at once" in done.stderr


def on_two_ranks(tmp_path, dies):
    options = {"lmbda": 0.5, "seq_kd": True, "save_steps": 50, "num_train_epochs": 50, "dies": dies}
    return [WORKER, "run", str(tmp_path), json.dumps(options)]


def test_ranks_stop_together_when_one_is_signalled(tmp_path):
    done = run_ranks(on_two_ranks(tmp_path, {"rank": 1, "step": 4, "signal": signal.SIGUSR1}), 2)
    assert done.returncode == 0, done.stderr[-3000:]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-5"  # told when the tokens of the next step were counted
    assert damage(checkpoint) is None
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}


def test_a_rank_that_dies_ends_the_run_with_the_reason(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run_command([*launcher, *on_two_ranks(tmp_path, {"rank": 1, "step": 4, "signal": signal.SIGKILL})])
    assert done.returncode != 0
    assert re.search(r"rank\s+: 1 .*\n\s+exitcode\s+: -9", done.stderr), done.stderr[-3000:]


@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_a_stop_saves_once_whatever_is_saved_when(tmp_path, monkeypatch, strategy):
    monkeypatch.setattr(transformers.Trainer, "_determine_best_metric", lambda *a, **k: False)
    options = {
        "save_strategy": strategy,
        "eval_strategy": "epoch" if strategy == "epoch" else "steps",
        "eval_steps": 1,
    }
    trainer = make_trainer(tmp_path, held_out=TWELVE_ROWS[:2], metric_for_best_model="eval_loss", **options)
    stop = StopOnSignal()
    stop.number = signal.SIGTERM  # during the first step
    trainer.train(stop=stop)
    assert trainer.state.global_step == 1
    assert trainer.stopped
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    evaluated = [log["step"] for log in trainer.state.log_history if "eval_loss" in log]
    assert evaluated == ([] if strategy == "epoch" else [1])  # the epoch is not over


def test_two_runs_into_one_folder_are_refused(tmp_path, saved, capsys):
    code = f"import sys, time\nfrom gkd.runs.folder import lock\nlock({str(tmp_path / 'run')!r})\nprint(1, flush=True)\ntime.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(SystemExit, match=f"another run writes there \\(process {other.pid} on "):
            train_gkd.main(command(saved, ANSWERS, tmp_path / "run", "--lmbda", "0"))
    finally:
        other.kill()
        other.wait()
    lock(str(tmp_path / "run"))  # a killed run holds nothing


# ---------------------------------------------------------------------- rows


def test_prompts_longer_than_the_window_are_cut_and_counted(saved, tmp_path, capsys, caplog):
    rows = tmp_path / "long.json"
    rows.write_text(json.dumps([{"prompt": "word " * 200}, {"prompt": "short"}]))
    flags = ["--lmbda", "1", "--max_steps", "1", "--max_length", "1024"]
    train_gkd.main([*command(saved, rows, tmp_path / "run"), *flags])
    assert "--max_length 1024 is more than the models' window: 512 is taken." in caplog.text
    assert json.loads((tmp_path / "run/run.json").read_text())["data"]["train"]["prompts_cut"] == 1
    with pytest.raises(SystemExit, match="leaves no room for a prompt in the models' window of 512"):
        train_gkd.main(
            [*command(saved, rows, tmp_path / "r2"), *flags[:4], "--max_length", "2048", "--max_new_tokens", "600"]
        )


def test_rows_that_generate_nothing_are_counted(tmp_path):
    trainer = make_trainer(tmp_path, lmbda=1.0, max_steps=1)
    with torch.no_grad():  # whatever the prompt, the stop token is next
        trainer.model.lm_head.weight.zero_()
        trainer.model.lm_head.weight[2] = 100 * trainer.model.model.norm.weight.sign()
        trainer.model.model.norm.weight.abs_()
    trainer.model.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([2]), 1e4))
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["on_policy/empty"], log["on_policy/completion_length"], log["on_policy/truncated"]) == (1, 1, 0)


def test_a_batch_with_nothing_to_score_trains_nothing(tmp_path):
    asked = {"messages": [{"role": "user", "content": "no answer, so nothing is scored"}]}
    rows = [asked] * 4 + TWELVE_ROWS[:4]
    trainer = make_trainer(tmp_path, rows=rows, max_steps=2, train_sampling_strategy="sequential", max_grad_norm=0.0)
    before = weights(trainer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[0]["loss"] == logs[0]["grad_norm"] == 0
    assert logs[1]["loss"] > 0
    assert logs[1].get("skipped_steps", 0) == 0
    assert any(not torch.equal(before[name], p) for name, p in weights(trainer).items())


def test_a_folder_of_another_process_is_free_after_a_kill(tmp_path):
    lock(str(tmp_path))
    lock(str(tmp_path))  # this process has it
    assert os.getpid() == int((tmp_path / "_run.owner").read_text().split()[1])
