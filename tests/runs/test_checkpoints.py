"""Checkpoints on a disk that fails: what is whole is found again, kept or passed over, and nothing goes by a half-written name."""

import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from trainers import TWELVE_ROWS, make_trainer
from transformers import TrainerCallback

from gkd.generation.sampling import SAMPLING_VERSION
from gkd.io.errors import RunStopped
from gkd.report.write import write_report
from gkd.runs.checkpoints import damage, seal
from gkd.runs.folder import claim, leave_behind, resume_point


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


@pytest.mark.parametrize("noted", [None, {"version": 1}, {"version": SAMPLING_VERSION}])
def test_text_that_another_version_would_draw_otherwise_is_told(tmp_path, caplog, noted):
    make_trainer(tmp_path, max_steps=2, lmbda=1.0).train()
    checkpoint = tmp_path / "run/checkpoint-1"
    path = checkpoint / "sampling.json"
    assert json.loads(path.read_text()) == {"version": SAMPLING_VERSION}
    path.unlink() if noted is None else path.write_text(json.dumps(noted))
    seal(checkpoint)
    trainer = make_trainer(tmp_path, max_steps=2, lmbda=1.0)
    assert "drew text" not in caplog.text  # a new run doesn't say so
    trainer.train(resume_from_checkpoint=str(checkpoint))
    told = f"{checkpoint}: its version of gkd drew text in another way, so what follows differs." in caplog.text
    assert told == (noted != {"version": SAMPLING_VERSION})
    assert trainer.state.global_step == 2


def test_checkpoints_keep_to_their_limit_and_the_best(tmp_path):
    options = {"save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    options["metric_for_best_model"] = "eval_dataset/forward_kl"
    trainer = make_trainer(tmp_path, held_out=TWELVE_ROWS[:2], **options)
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
    options = {"save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 1, "held_out": TWELVE_ROWS[:2]}
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
    trainer = make_trainer(tmp_path, max_steps=1, held_out=TWELVE_ROWS[:2])
    trainer.train()
    trainer.save_model()
    trainer.evaluate()
    trainer.save_state()
    write_report(tmp_path / "run", tmp_path / "run")
    expected = {"checkpoint-1", "model.safetensors", "trainer_state.json", "evaluation/results.json", "report.html"}
    assert expected <= renamed


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


def test_output_folder(tmp_path):
    assert resume_point(str(tmp_path / "new"), None) is None
    assert resume_point(str(tmp_path / "new"), "auto") is None
    checkpoint = tmp_path / "run/checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    with pytest.raises(ValueError, match="already holds a run"):
        resume_point(str(tmp_path / "run"), None)
    assert resume_point(str(tmp_path / "run"), "auto") == str(checkpoint)
    assert resume_point(str(tmp_path / "run"), str(checkpoint)) == str(checkpoint)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        resume_point(str(tmp_path / "new"), "True")
    finished = tmp_path / "finished"
    finished.mkdir()
    (finished / "model.safetensors").touch()
    for resume in (None, "auto", str(checkpoint)):  # nothing resumes from a finished model without checkpoints
        with pytest.raises(ValueError, match="already holds a run .model.safetensors.. Choose another --output_dir"):
            resume_point(str(finished), resume)
    with pytest.raises(ValueError, match="not a checkpoint"):
        resume_point(str(tmp_path / "new"), "elsewhere")
