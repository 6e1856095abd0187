"""Steps that are not finite and memory that is too short: what the run does, and what the user sees."""

import json
import math
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from commands import ANSWERS, command
from preloaded import run_ranks
from progress import run as run_command
from tiny import REPO
from trainers import TWELVE_ROWS, make_trainer, weights

import gkd.generation.generator
import gkd.training.student
import train_gkd
from gkd.io.errors import RunStopped
from gkd.losses.objective import Objective
from gkd.runs import choices
from gkd.training.trainer import GKDTrainer

WORKER = str(REPO / "tests/workers/resume_worker.py")


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
    rows.write_text(json.dumps(TWELVE_ROWS))
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
    rows.write_text(json.dumps(TWELVE_ROWS))
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
    words = [str(Path(WORKER).with_name("nan_worker.py")), str(tmp_path), wrapper]
    if wrapper == "ddp":
        done = run_ranks(words, 2)
    else:  # DeepSpeed is told of the CPU before it is imported
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = run_command([*launcher, *words])
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
        forward, generate = gkd.training.student.last_hidden_states, gkd.generation.generator.generate_dynamic

        def checked(count):
            if count > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is small.")

        def narrow_forward(model, ids, mask):
            checked(len(ids))
            return forward(model, ids, mask)

        def narrow_generate(model, prompts, *args):
            checked(len(prompts))
            return generate(model, prompts, *args)

        monkeypatch.setattr(gkd.training.student, "last_hidden_states", narrow_forward)
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
    short_memory(0)
    with pytest.raises(RunStopped, match=r"in generating \(student\): .* --generation_batch_size"):
        make_trainer(tmp_path, lmbda=1.0).train()


def test_out_of_memory_in_the_evaluation_after_training(saved, tmp_path, monkeypatch):
    """The student is there: it is saved before."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(TWELVE_ROWS))

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
    assert make_trainer(tmp_path).stability.micro_rows is None


def test_a_resumed_run_takes_what_fitted_before_the_checkpoint(tmp_path, monkeypatch, short_memory):
    """Bit by bit, however much memory there is by then; smaller micro-batches than the flag's only with the flag."""
    options = {"lmbda": 1.0, "max_steps": 4, "temperature": 2.0}
    short_memory(3)
    whole = make_trainer(tmp_path / "whole", auto_micro_batch=True, **options)
    whole.train()
    monkeypatch.undo()
    generate, rows = gkd.generation.generator.generate_dynamic, []

    def counted(model, prompts, *args):
        rows.append(len(prompts))
        return generate(model, prompts, *args)

    monkeypatch.setattr(gkd.generation.generator, "generate_dynamic", counted)
    for auto in (True, False):
        trainer = make_trainer(tmp_path / f"resumed {auto}", auto_micro_batch=auto, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole/run/checkpoint-2"))
        assert trainer.stability.micro_rows == (2 if auto else None)
        for name, weight in weights(whole).items():
            assert not auto or torch.equal(weights(trainer)[name], weight), name
        kept = json.loads(Path(trainer.args.output_dir, choices.NAME).read_text())["chosen"]
        assert kept == {choices.GENERATION_ROWS: 2, choices.MICRO_ROWS: 2}
    assert rows == [2] * 8  # 4 rows a step, 2 steps, twice


def test_short_rows_that_were_put_together_are_taken_apart_again(tmp_path, short_memory, caplog):
    """The flag says one row at a time, so more than that are no reason to stop."""
    rows = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes " * n}]}
        for n in (15, 1, 1, 2, 1, 1)
    ]
    options = {"gradient_accumulation_steps": 6, "per_device_train_batch_size": 1, "max_steps": 2, "rows": rows}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    assert max(batch.rows for batch in whole.step.batches) > 1
    short_memory(1)
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    assert trainer.step.rows == 6
    assert "micro-batches go on in pieces of 1" in caplog.text
    for mine, theirs in zip(trainer.state.log_history, whole.state.log_history, strict=True):
        for name in {"loss", "grad_norm", "dataset/forward_kl", "dataset/completion_length"} & theirs.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    short_memory(0)
    with pytest.raises(RunStopped, match="Out of memory in the student's forward and the divergence of 1 rows"):
        make_trainer(tmp_path / "none", **options).train()
    assert not (tmp_path / "none/run" / choices.NAME).exists()


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
    assert again.stability.micro_rows == 2
