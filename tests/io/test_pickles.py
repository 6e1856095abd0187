"""Code in checkpoints, states and datasets does not run."""

import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hostile import Runs, command, refusal
from tiny import ROWS

import train_gkd
from gkd.data.loading import load_rows
from gkd.data.rows import DataError
from gkd.io.pickles import check_checkpoint, load_as_data
from gkd.runs.checkpoints import seal


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_checkpoint_does_not_run(saved, checkpoint, tmp_path, name, form):
    out, trap = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(checkpoint, out / "checkpoint-1")
    bad = out / "checkpoint-1" / name
    assert bad.is_file()
    if form == "pickle":
        bad.write_bytes(pickle.dumps(Runs(trap)))
    else:
        torch.save({"state": Runs(trap)}, bad, _use_new_zipfile_serialization=form == "zip")
    seal(out / "checkpoint-1")  # whoever made it knows how
    said = refusal(train_gkd.main, command(saved, out, "--max_steps", "2", "--resume_from_checkpoint", "auto"))
    assert said.startswith(f"train_gkd.py: {bad} is refused: ")
    assert not trap.exists()


def test_a_checkpoint_of_our_own_is_taken(saved, checkpoint, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(checkpoint, out / "checkpoint-1")
    train_gkd.main(command(saved, out, "--max_steps", "2", "--resume_from_checkpoint", "auto"))
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2


def test_who_loads_a_checkpoint_without_weights_only_is_overruled(tmp_path, monkeypatch):
    """DeepSpeed calls torch.load with weights_only=False."""
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    torch.save({"seed": np.random.get_state()[1], "weight": torch.ones(2)}, tmp_path / "mine.pt")
    load_as_data(tmp_path)
    trap = tmp_path / "ran"
    torch.save(Runs(trap), tmp_path / "theirs.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "theirs.pt", weights_only=False)
    with pytest.raises(ValueError, match=r"theirs.pt is refused: it names \w+.mkdir"):
        load_as_data(tmp_path)
    assert not trap.exists()


def test_code_in_a_sharded_checkpoint_does_not_run(tmp_path):
    """FSDP's checkpoints: torch.distributed.checkpoint unpickles `.metadata`."""
    torch.distributed.checkpoint.save({"w": torch.ones(2), "step": 3}, checkpoint_id=tmp_path / "model")
    check_checkpoint(tmp_path)
    trap = tmp_path / "ran"
    (tmp_path / "model/.metadata").write_bytes(pickle.dumps(Runs(trap)))
    with pytest.raises(ValueError, match=r"\.metadata is refused: it names \w+.mkdir"):
        check_checkpoint(tmp_path)
    assert not trap.exists()


def test_a_pickle_in_a_dataset_does_not_run(tmp_path):
    trap = tmp_path / "ran"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/train.pkl").write_bytes(pickle.dumps(Runs(trap)))
    with pytest.raises(DataError, match="can't load split 'train' of this folder"):
        load_rows(str(tmp_path / "folder"), "train")
    # Old versions of pyarrow unpickled the type of a column.
    kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Runs(trap))}
    schema = pa.schema([pa.field("prompt", pa.string(), metadata=kind)])
    pq.write_table(pa.table({"prompt": ["hi"]}, schema=schema), tmp_path / "rows.parquet")
    assert load_rows(str(tmp_path / "rows.parquet"), "train")[0] == {"prompt": "hi"}
    assert not trap.exists()


def test_a_state_names_a_best_model_whose_code_does_not_run(saved, tmp_path):
    """`best_model_checkpoint` may be any folder; FSDP unpickles what is in it."""
    run, theirs, held_out = tmp_path / "run", tmp_path / "theirs", tmp_path / "rows.json"
    theirs.mkdir()
    (theirs / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    held_out.write_text(json.dumps(ROWS[:1]))
    best = ["--load_best_model_at_end", "True", "--save_strategy", "steps", "--save_steps", "1"]
    flags = ["--eval_dataset_name", held_out, "--eval_strategy", "steps", "--eval_steps", "1", *best]
    train_gkd.main(command(saved, run, *flags, "--max_steps", "1"))
    path = run / "checkpoint-1/trainer_state.json"
    state = json.loads(path.read_text()) | {"best_model_checkpoint": str(theirs), "best_metric": -1e9}
    path.write_text(json.dumps(state | {"best_global_step": 7}))
    seal(run / "checkpoint-1")
    said = refusal(train_gkd.main, command(saved, run, *flags, "--max_steps", "2", "--resume_from_checkpoint", "auto"))
    assert f"{theirs}/.metadata is refused: it names " in said
    assert not (tmp_path / "ran").exists()


def test_code_behind_a_link_in_a_checkpoint_does_not_run(tmp_path):
    """FSDP's and DeepSpeed's folders are read through a link, which a search for pickles passes by."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/.metadata").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1/pytorch_model_fsdp_0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="pytorch_model_fsdp_0 is refused: it is a link to a folder"):
        check_checkpoint(tmp_path / "checkpoint-1")
    assert not (tmp_path / "ran").exists()
