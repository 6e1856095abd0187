"""Each fault injected: what the run does, and what the user sees."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import REPO
from datasets import Dataset
from progress import finish
from progress import run as run_command
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_train_gkd import ANSWERS, command
from tiny import make_model, make_tokenizer
from transformers import TrainerCallback

import gkd.generation.generator
import gkd.training.comparison
import train_gkd
from gkd.config.training import GKDArguments
from gkd.io.errors import RunStopped
from gkd.losses.objective import Objective
from gkd.report.write import write_report
from gkd.runs.checkpoints import damage, seal
from gkd.runs.folder import claim, leave_behind, lock, resume_point
from gkd.runs.results import RECORD_FIELDS, RESULT_FIELDS, add_result, read_records, read_results, write_records
from gkd.training.faults import StopOnSignal
from gkd.training.trainer import GKDTrainer

WORKER = str(REPO / "tests/workers/resume_worker.py")
ROWS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes " * (n % 3 + 1)}]}
    for n in range(12)
]


def make_trainer(tmp_path, cls=GKDTrainer, rows=ROWS, held_out=None, **options):
    defaults = {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "logging_steps": 1,
        "save_steps": 1,
        "max_new_tokens": 6,
        "max_length": 80,
        "lmbda": 0.0,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = GKDArguments(**(defaults | options))
    data = [None if part is None else Dataset.from_list(part) for part in (rows, held_out)]
    return cls(make_model(0), make_model(1), args, None, *data, processing_class=make_tokenizer())


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


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
    done = run_command(typed, shell=True, cwd=REPO)
    assert done.returncode == 0, done.stderr[-2000:]
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


def two_ranks(tmp_path, dies):
    options = {"lmbda": 0.5, "seq_kd": True, "save_steps": 50, "num_train_epochs": 50, "dies": dies}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*launcher, WORKER, "run", str(tmp_path), json.dumps(options)]
    return run_command(words)


def test_ranks_stop_together_when_one_is_signalled(tmp_path):
    done = two_ranks(tmp_path, {"rank": 1, "step": 4, "signal": signal.SIGUSR1})
    assert done.returncode == 0, done.stderr[-3000:]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-5"  # told when the tokens of the next step were counted
    assert damage(checkpoint) is None
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}


def test_a_rank_that_dies_ends_the_run_with_the_reason(tmp_path):
    done = two_ranks(tmp_path, {"rank": 1, "step": 4, "signal": signal.SIGKILL})
    assert done.returncode != 0
    assert re.search(r"rank\s+: 1 .*\n\s+exitcode\s+: -9", done.stderr), done.stderr[-3000:]


# ---------------------------------------------------------------------- disk


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    trainer, save = make_trainer(tmp_path), torch.save

    def full(value, path, *args, **kwargs):
        if trainer.state.global_step == 2 and str(path).endswith("optimizer.pt"):
            Path(path).write_bytes(b"a part")
            raise OSError(28, "No space left on device")
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunStopped) as stop:
        trainer.train()
    assert "checkpoint-2 could not be written: [Errno 28] No space left on device" in str(stop.value)
    assert "Free some space. " in str(stop.value)
    assert "checkpoint-1 is whole: go on with it by --resume_from_checkpoint auto." in str(stop.value)
    assert sorted(path.name for path in (tmp_path / "run").glob("*checkpoint*")) == ["checkpoint-1"]
    assert not (tmp_path / "run/_unfinished").exists()
    assert resume_point(str(tmp_path / "run"), "auto") == str(tmp_path / "run/checkpoint-1")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, caplog):
    make_trainer(tmp_path).train()
    run = tmp_path / "run"
    whole = (run / "checkpoint-3/model.safetensors").read_bytes()
    for content, said in (
        (whole[:1000], f"model.safetensors has 1,000 of {len(whole):,} bytes"),
        (whole[:-1] + b"\x00" if whole[-1] else whole[:-1] + b"\x01", "model.safetensors has changed"),
    ):
        (run / "checkpoint-3/model.safetensors").write_bytes(content)
        assert resume_point(str(run), "auto") == str(run / "checkpoint-2")
        assert f"checkpoint-3 is damaged: {said}" in caplog.text
        with pytest.raises(ValueError, match=f"checkpoint-3: it is damaged: {said}"):
            resume_point(str(run), str(run / "checkpoint-3"))
    (run / "checkpoint-3/model.safetensors").unlink()
    assert damage(run / "checkpoint-3") == "model.safetensors is missing"
    make_trainer(tmp_path).train(resume_from_checkpoint=resume_point(str(run), "auto"))
    assert damage(run / "checkpoint-3") is None  # written again, over the damaged one
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match="No other is whole"):
        resume_point(str(run), "auto")


def test_checkpoints_keep_to_their_limit_and_the_best(tmp_path):
    options = {"save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    options["metric_for_best_model"] = "eval_dataset/forward_kl"
    trainer = make_trainer(tmp_path, held_out=ROWS[:2], **options)
    trainer.train()
    left = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert trainer.state.best_model_checkpoint == str(
        tmp_path / "run" / f"checkpoint-{trainer.state.best_global_step}"
    )
    assert left == {Path(trainer.state.best_model_checkpoint).name}
    state = json.loads((Path(trainer.state.best_model_checkpoint) / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == trainer.state.best_model_checkpoint


class _ClockSetBack(TrainerCallback):
    """Each checkpoint is older than the one before it, and the first is from a host whose clock runs ahead."""

    def on_save(self, args, state, control, **kwargs):
        moment = time.time() + 10_000 - 1_000 * state.global_step
        os.utime(Path(args.output_dir, f"checkpoint-{state.global_step}"), (moment, moment))


@pytest.mark.parametrize(
    ("best", "left"), [(None, {"checkpoint-3", "checkpoint-4"}), (1, {"checkpoint-1", "checkpoint-4"})]
)
def test_checkpoints_are_rotated_by_step_whatever_their_times(tmp_path, best, left):
    run = tmp_path / "run"
    for other in ("_left-checkpoint-9", "checkpoint-2-kept", "checkpoint-old"):  # of the user: none of them counts
        (run / other).mkdir(parents=True)
    trainer = make_trainer(tmp_path, max_steps=4, save_total_limit=2)
    trainer.add_callback(_ClockSetBack())
    if best is not None:
        trainer.add_callback(_Best(best))
    trainer.train()
    assert {path.name for path in run.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)} == left
    assert {"_left-checkpoint-9", "checkpoint-2-kept", "checkpoint-old"} <= {path.name for path in run.iterdir()}
    assert resume_point(str(run), "auto") == str(run / "checkpoint-4")


class _Best(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            # As a user writes a path: other letters, the same folder.
            state.best_model_checkpoint = str(Path(args.output_dir, "..", "run", f"checkpoint-{self.step}"))


def test_a_finished_run_is_not_trained_further(tmp_path):
    make_trainer(tmp_path, max_steps=2).train()  # of 3 an epoch
    again = make_trainer(tmp_path, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    assert not (tmp_path / "run/checkpoint-3").exists()
    with pytest.raises(ValueError, match="No checkpoint in .* is whole"):
        make_trainer(tmp_path / "other").train(resume_from_checkpoint=True)


def test_a_run_that_goes_back_leaves_later_checkpoints_behind(tmp_path):
    make_trainer(tmp_path).train()
    run = tmp_path / "run"
    assert claim(str(run), str(run / "checkpoint-1"), main_process=True) == str(run / "checkpoint-1")
    leave_behind(str(run), str(run / "checkpoint-1"))
    assert {path.name for path in run.glob("*checkpoint-*")} == {
        "checkpoint-1",
        "_left-checkpoint-2",
        "_left-checkpoint-3",
    }
    assert resume_point(str(run), "auto") == str(run / "checkpoint-1")
    leave_behind(str(run), str(run / "_left-checkpoint-3"))  # the way back to them leaves what came before
    assert resume_point(str(run), "auto") == str(run / "checkpoint-1")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # tokenizers'
        RuntimeError("basic_ios::clear: iostream error"),  # torch's, of small files
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
)
def test_whatever_says_that_nothing_can_be_written(tmp_path, monkeypatch, error):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()

    def full(self, folder):
        Path(folder, "part").write_text("")
        raise error

    monkeypatch.setattr(type(trainer.processing_class), "save_pretrained", full)
    with pytest.raises(RunStopped, match="The model in .*/run could not be written: .* --resume_from_checkpoint auto"):
        trainer.save_model()
    assert not (tmp_path / "run/_unfinished").exists()
    (tmp_path / "run/checkpoint-2").rename(tmp_path / "gone")
    with pytest.raises(RunStopped, match="checkpoint-2 could not be written: .*checkpoint-1 is whole"):
        trainer._save_checkpoint(trainer.model, None)


def test_the_best_checkpoint_is_kept_when_the_folder_has_moved(tmp_path):
    options = {"save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 1, "held_out": ROWS[:2]}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_dataset/forward_kl", "max_steps": 4}
    make_trainer(tmp_path / "a", max_steps=2, **{k: v for k, v in options.items() if k != "max_steps"}).train()
    state = tmp_path / "a/run/checkpoint-2/trainer_state.json"
    told = json.loads(state.read_text())
    told |= {"best_global_step": 1, "best_metric": -1.0, "best_model_checkpoint": str(tmp_path / "a/run/checkpoint-1")}
    state.write_text(json.dumps(told))
    seal(state.parent)
    (tmp_path / "a").rename(tmp_path / "b")
    trainer = make_trainer(tmp_path / "b", **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "b/run/checkpoint-1")
    assert (tmp_path / "b/run/checkpoint-1").is_dir()


@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_a_stop_saves_once_whatever_is_saved_when(tmp_path, monkeypatch, strategy):
    monkeypatch.setattr(transformers.Trainer, "_determine_best_metric", lambda *a, **k: False)
    options = {
        "save_strategy": strategy,
        "eval_strategy": "epoch" if strategy == "epoch" else "steps",
        "eval_steps": 1,
    }
    trainer = make_trainer(tmp_path, held_out=ROWS[:2], metric_for_best_model="eval_loss", **options)
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


def test_what_gets_its_name_is_on_the_disk_before(tmp_path, monkeypatch):
    """Every rename of a checkpoint, a model, results, state and report comes after an fsync of all its files."""
    flushed, renamed, fsync, replace = set(), set(), os.fsync, os.replace

    def noting(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checked(source, target, **kwargs):
        files = [path for path in (Path(source), *Path(source).rglob("*")) if path.is_file()]
        assert all(path.stat().st_ino in flushed for path in files), source
        renamed.add(str(Path(target).relative_to(tmp_path / "run")))
        replace(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "replace", checked)
    monkeypatch.setattr(os, "rename", checked)
    trainer = make_trainer(tmp_path, max_steps=1, held_out=ROWS[:2])
    trainer.train()
    trainer.save_model()
    trainer.evaluate()
    trainer.save_state()
    write_report(tmp_path / "run", tmp_path / "run")
    expected = {"checkpoint-1", "model.safetensors", "trainer_state.json", "evaluation/results.json", "report.html"}
    assert expected <= renamed


@pytest.mark.parametrize(
    ("name", "damaged", "kept", "said"),
    [
        (
            "results.json",
            lambda whole: b"",
            {"step 2", "step 3", "teacher"},
            "Whole results, which are kept: 0; eval_gkd.py finds the others again.",
        ),
        (
            "results.json",
            lambda whole: whole[: whole.index(b'"step 1"')],
            {"before", "step 2", "step 3", "teacher"},
            "Whole results, which are kept: 2; ",
        ),
        (
            "results.json",
            lambda whole: b'{"results": [{"model": "before"}]}',
            {"step 2", "step 3", "teacher"},
            "entry",
        ),
        ("rows", lambda whole: b"", None, None),
        ("rows", lambda whole: whole[:30] + b"\x00" + whole[31:], None, "line 1) and is now"),
        (
            "rows",
            lambda whole: whole[:-1].replace(b'"row"', b'"rwo"') + b"\n",
            None,
            "line 1 and 1 others) and is now",
        ),
    ],
    ids=["empty", "torn", "no results", "rows empty", "row broken", "no rows"],
)
def test_a_damaged_evaluation_is_put_aside_and_made_anew(tmp_path, caplog, name, damaged, kept, said):
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "held_out": ROWS[:2]}
    make_trainer(tmp_path, max_steps=1, **options).train()
    folder = tmp_path / "run/evaluation"
    before = {result["model"]: result for result in read_results(tmp_path / "run")}
    assert before.keys() == {"before", "step 1", "teacher"}
    path = folder / name if kept else folder / "rows" / before["teacher"]["records"]
    whole = path.read_bytes()
    path.write_bytes(damaged(whole))
    make_trainer(tmp_path, max_steps=3, **options | {"eval_on_start": False}).train(resume_from_checkpoint=True)
    after = {result["model"]: result for result in read_results(tmp_path / "run")}
    assert after.keys() == (kept or {"before", "step 1", "step 2", "step 3", "teacher"})
    assert after["teacher"]["metrics"] == before["teacher"]["metrics"]
    if kept is None:  # the rows that the damaged file lacks are evaluated again, to the same text
        texts = [[json.loads(line)["text"] for line in part.splitlines()] for part in (whole, path.read_bytes())]
        assert texts[0] == texts[1]
    if said is not None:
        (line,) = [record.message for record in caplog.records if "is damaged" in record.message]
        assert line.startswith(f"{path} is damaged (")
        assert said in line
        assert Path(f"{path}.damaged").read_bytes() == damaged(whole)
    assert not list((tmp_path / "run").rglob("*.partial"))


RESULT = dict.fromkeys(RESULT_FIELDS, 1) | {
    "model": "after",
    "step": None,
    "data": "d",
    "settings": "s",
    "metrics": {},
}


@pytest.mark.parametrize(
    "change",
    [
        {"model": ["after"]},
        {"step": "1"},
        {"data": None},
        {"gib": "1"},
        {"metrics": {"score/x": 0.5}},
        {"metrics": {"score/x": {"value": 1, "low": None, "high": 1}}},
        {"metrics": {"elsewhere/x": {"value": 1, "low": 1, "high": 1}}},
        {"metrics": {"score": {"value": 1, "low": 1, "high": 1}}},
        {"change": {"score/x": {"value": "1", "low": 1, "high": 1}}},
    ],
    ids=str,
)
def test_what_is_no_result_is_put_aside(tmp_path, caplog, change):
    figures = {"score/x": {"value": 1, "low": float("nan"), "high": 1.5}}
    whole = RESULT | {"metrics": figures, "change": figures}
    path = tmp_path / "evaluation/results.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"results": [whole, whole | change]}))
    (entry,) = read_results(tmp_path)
    assert "results.json is damaged (an entry is not a result) and is now results.json.damaged" in caplog.text
    assert entry["model"] == "after"
    assert entry["step"] is None
    assert len(read_results(tmp_path)) == 1


def test_half_of_a_surrogate_pair_ends_no_evaluation(tmp_path):
    """It comes in names of files, for one: Python reads a byte of them that does not decode as such a half."""
    half = "a\ud800b \udce9"
    records = [dict.fromkeys(RECORD_FIELDS) | {"row": 0, "text": half}]
    write_records(tmp_path / "rows.jsonl", records)
    assert read_records(tmp_path / "rows.jsonl") == records
    add_result(tmp_path, RESULT | {"model": half, "data": half})
    assert read_results(tmp_path)[0]["data"] == half
    write_report(tmp_path, tmp_path / "report")
    assert r"\udce9" in (tmp_path / "report/report.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------- steps that are not finite


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch, what, optim):
    loss = Objective.loss
    bad = {2}

    class Watched(GKDTrainer):
        def _get_grad_norm(self, *args, **kwargs):
            seen.append(weights(self))
            return super()._get_grad_norm(*args, **kwargs)

    def spoiled(self, hidden, *args, **kwargs):
        total, statistics = loss(self, hidden, *args, **kwargs)
        if trainer.state.global_step + 1 in bad:
            if what == "loss":
                return total + torch.inf, statistics
            hidden.register_hook(lambda grad: grad * torch.nan)
        return total, statistics

    monkeypatch.setattr(Objective, "loss", spoiled)
    seen = []
    trainer = make_trainer(tmp_path, Watched, optim=optim)
    trainer.train()
    first, second, third = seen
    changed = [
        any(not torch.equal(a[name], b[name]) for name in a)
        for a, b in ((first, second), (second, third), (third, weights(trainer)))
    ]
    assert changed == [True, False, True]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log.get("skipped_steps", 0) for log in logs] == [0, 1, 1]
    assert [math.isnan(log["loss"]) for log in logs] == [False, True, False]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_that_ends_on_skipped_steps_says_so(saved, tmp_path, monkeypatch, capsys, what):
    """In its last line; losses in its log are those of the other steps; and resumed in between it says the same."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ROWS))
    compute, norms, good = GKDTrainer.compute_loss, GKDTrainer._get_grad_norm, {}

    def spoiled(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        if self.state.global_step + 1 in (1, 3, 4) and self.step.losses:  # the second micro-batch
            if what == "loss":
                return loss * torch.nan
            loss.register_hook(lambda grad: grad * torch.nan)
        return loss

    def noted(self, *args, **kwargs):
        good.setdefault(self.state.global_step + 1, float(sum(self.step.losses)))
        return norms(self, *args, **kwargs)

    monkeypatch.setattr(GKDTrainer, "compute_loss", spoiled)
    monkeypatch.setattr(GKDTrainer, "_get_grad_norm", noted)

    def losses(folder):
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return [log.get("loss", log.get("train_loss")) for log in history if {"loss", "train_loss"} & log.keys()]

    flags = ["--lmbda", "0", "--gradient_accumulation_steps", "2", "--max_steps", "4", "--logging_steps", "2"]
    for folder in (tmp_path / "run", tmp_path / "again"):
        train_gkd.main(
            [*command(saved, rows, folder), *flags, "--save_steps", "2", "--resume_from_checkpoint", "auto"]
        )
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert last == (
            "3 of 4 optimizer steps had a NaN or infinite loss or gradient and were skipped, the last 2 among them: the "
            f"model is that of step 2. Their rows are in {folder}/_skipped_steps-0.jsonl. Look at these rows, or lower "
            "--learning_rate."
        )
        assert losses(folder)[:2] == [pytest.approx(good[2], rel=1e-4), pytest.approx(math.nan, nan_ok=True)]
        if folder.name == "run":
            assert losses(folder)[2] == pytest.approx(good[2], rel=1e-4)
            (tmp_path / "again").mkdir()
            (folder / "checkpoint-2").rename(tmp_path / "again/checkpoint-2")
    assert (tmp_path / "again/_skipped_steps-0.jsonl").read_text().count('"step": 4') == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--max_steps", "2", "--save_steps", "1"],
            r"weights are not finite after step 1 \(\S+weight\), so they are not",
        ),
        (
            ["--max_steps", "1"],
            r"weights are not finite after step 1 \(\S+weight\), so they are not saved. Lower --learn",
        ),
        (["--max_steps", "9"], r"weights are not finite any more \(\S+weight\): .* Lower --learning_rate"),
    ],
    ids=["checkpoint", "model", "later steps"],
)
def test_weights_that_are_not_finite_are_not_saved(saved, tmp_path, flags, said):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ROWS))
    words = [
        *command(saved, rows, tmp_path / "run"),
        "--lmbda",
        "0",
        "--save_strategy",
        "no",
        "--learning_rate",
        "1e39",
    ]
    words += ["--save_strategy", "steps"] if "--save_steps" in flags else []
    with pytest.raises(SystemExit, match=f"^train_gkd.py: The student's {said}"):
        train_gkd.main([*words, "--warmup_steps", "0", "--lr_scheduler_type", "constant", *flags])
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_student_that_is_not_finite_writes_nothing(saved, tmp_path):
    flags = [
        "--lmbda",
        "1",
        "--learning_rate",
        "1e30",
        "--warmup_steps",
        "0",
        "--max_steps",
        "2",
        "--save_strategy",
        "no",
    ]
    with pytest.raises(SystemExit, match="^train_gkd.py: The logits of LlamaForCausalLM are not finite"):
        train_gkd.main([*command(saved, ANSWERS, tmp_path / "run"), *flags])


def test_a_checkpoint_of_trl_that_lacks_a_tensor_is_refused(tmp_path):
    """It has no checksums, and transformers would go on with the base's tensor."""
    make_trainer(tmp_path).train()
    checkpoint = tmp_path / "run/checkpoint-2"
    (checkpoint / "checksums.json").unlink()
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunStopped, match="The checkpoint's weights lack lm_head.weight"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(("step", "name"), [(1, "checkpoint-2"), (-3, "checkpoint-2"), (True, "checkpoint-1")])
def test_a_state_of_another_step_is_damage(tmp_path, step, name):
    checkpoint = tmp_path / "run" / name
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    with pytest.raises(ValueError, match="global_step|tells step 1, and the folder's name 2"):
        resume_point(str(tmp_path / "run"), "auto")
    leave_behind(str(tmp_path / "run"), None)
    assert checkpoint.is_dir()


def test_a_run_of_skipped_steps_alone_is_none(tmp_path, monkeypatch):
    norms = GKDTrainer._get_grad_norm
    monkeypatch.setattr(
        GKDTrainer, "_get_grad_norm", lambda self, *a, **k: norms(self, self.model, torch.tensor(torch.nan))
    )
    with pytest.raises(
        RunStopped, match="^All 2 optimizer steps had a NaN .*: nothing was trained. Their rows are in"
    ):
        make_trainer(tmp_path, max_steps=2, save_strategy="no").train()


def test_many_in_a_row_stop_the_run_and_dump_its_rows(tmp_path, monkeypatch):
    loss = Objective.loss
    monkeypatch.setattr(Objective, "loss", lambda *a, **k: (lambda r: (r[0] * torch.nan, r[1]))(loss(*a, **k)))
    trainer = make_trainer(tmp_path, max_skipped_steps=2, max_steps=9, logging_steps=9, save_strategy="no")
    before = weights(trainer)
    with pytest.raises(RunStopped, match=r"2 optimizer steps in a row .* --max_skipped_steps"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert all(torch.equal(before[name], p) for name, p in weights(trainer).items())
    dumped = [json.loads(line) for line in (tmp_path / "run/_skipped_steps-0.jsonl").read_text().splitlines()]
    assert [row["step"] for row in dumped] == [1] * 4 + [2] * 4
    assert all(row["completion"].startswith("yes") and row["loss_of_micro_batch"] == "nan" for row in dumped)


@pytest.mark.parametrize("wrapper", ["ddp", "zero2", "zero3"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(tmp_path, wrapper):
    if wrapper != "ddp" and not find_spec("deepspeed"):
        pytest.skip("needs deepspeed")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*launcher, str(Path(WORKER).with_name("nan_worker.py")), str(tmp_path), wrapper]
    done = run_command(words)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        once, always = json.loads((tmp_path / f"found-{rank}.json").read_text())
        assert once["stopped"] is None
        assert once["skipped"] == [0, 1, 1]
        assert 0 < once["losses"][2] < once["losses"][0]  # it learns all the same
        assert always["stopped"].startswith("3 optimizer steps in a row")
        assert (tmp_path / f"always/_skipped_steps-{rank}.jsonl").is_file()


# ---------------------------------------------------------------------- memory


@pytest.fixture
def short_memory(monkeypatch):
    """Batches of more than `rows` rows, or of more prompts that generate, don't fit."""

    def make(rows):
        forward, generate = gkd.training.comparison.last_hidden_states, gkd.generation.generator.generate_dynamic

        def checked(count):
            if count > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is small.")

        def narrow_forward(model, ids, mask):
            checked(len(ids))
            return forward(model, ids, mask)

        def narrow_generate(model, prompts, *args):
            checked(len(prompts))
            return generate(model, prompts, *args)

        monkeypatch.setattr(gkd.training.comparison, "last_hidden_states", narrow_forward)
        monkeypatch.setattr(gkd.generation.generator, "generate_dynamic", narrow_generate)

    return make


def test_out_of_memory_says_where_and_what_helps(tmp_path, short_memory):
    short_memory(2)
    with pytest.raises(RunStopped) as stop:
        make_trainer(tmp_path).train()
    said = str(stop.value)
    assert re.search(
        r"Out of memory in the student's forward and the divergence of 4 rows x \d+ tokens: Tried to", said
    )
    assert "Tried to allocate 2.00 GiB. What helps: --gradient_checkpointing" in said
    assert "--auto_micro_batch True" in said
    with pytest.raises(RunStopped, match=r"in generating \(student\): .* --generation_batch_size"):
        make_trainer(tmp_path, lmbda=1.0).train()


def test_out_of_memory_in_the_evaluation_after_training(saved, tmp_path, monkeypatch):
    """The student is there: it is saved before."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ROWS))

    def short(self, candidate):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is small.")

    def fill(self, *args, evaluate=GKDTrainer.evaluate, **kwargs):
        if not self.is_in_train:
            monkeypatch.setattr("gkd.training.evaluation.Evaluation.student", short)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(GKDTrainer, "evaluate", fill)
    flags = ["--model_name_or_path", saved / "student", "--teacher_model_name_or_path", saved / "teacher"]
    flags += ["--dataset_name", rows, "--eval_dataset_name", rows, "--max_steps", 1]
    flags += ["--output_dir", tmp_path / "out", "--lmbda", 0, "--report_to", "none", "--preflight", "off"]
    with pytest.raises(
        SystemExit, match=r"^train_gkd.py: Out of memory in evaluating: .*--per_device_eval_batch_size"
    ):
        train_gkd.main([str(flag) for flag in flags])
    assert (tmp_path / "out/model.safetensors").is_file()


def test_auto_micro_batch_keeps_the_global_batch(tmp_path, short_memory, caplog):
    """As many steps, the same loss and the same weights as with enough memory, and a restart knows what fits."""
    options = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 6,
        "max_steps": 3,
        "learning_rate": 1e-3,
    }
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    short_memory(2)
    trainer = make_trainer(tmp_path, auto_micro_batch=True, **options)
    trainer.train()
    assert "micro-batches go on in pieces of 2" in caplog.text
    for mine, theirs in zip(trainer.state.log_history, whole.state.log_history, strict=True):
        for name in {"loss", "grad_norm", "dataset/forward_kl", "dataset/completion_length"} & theirs.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(trainer)[name], weight, rtol=1e-3, atol=1e-4)
    assert make_trainer(tmp_path, auto_micro_batch=True).stability.micro_rows == 2
    generating = make_trainer(tmp_path, auto_micro_batch=True, lmbda=1.0)
    generating.train()
    assert generating.rollout.writer.generator.batch_size == 2


def test_several_processes_take_smaller_micro_batches_on_the_next_start(tmp_path, short_memory, monkeypatch):
    """One rank's memory is too short in the middle of a step, where the others can't be told."""
    short_memory(2)
    options = {"auto_micro_batch": True, "max_steps": 1}
    trainer = make_trainer(tmp_path, **options)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(RunStopped, match=r"with 4 rows at a time .* now says 2: start again with --resume_from_check"):
        trainer.train()
    monkeypatch.undo()
    short_memory(2)
    again = make_trainer(tmp_path, **options)
    again.train()
    assert again.state.global_step == 1


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
    rows = [asked] * 4 + ROWS[:4]
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
