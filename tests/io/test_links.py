"""Links and names in a folder that somebody sent lead to no file outside."""

import json
import shutil

import pytest
from commands import ANSWERS
from hostile import command, refusal

import eval_gkd
import train_gkd
from gkd.cli.report import main as report
from gkd.io.files import new_figure, save_figure
from gkd.runs.checkpoints import damage
from gkd.runs.results import RECORD_FIELDS, RESULT_FIELDS, records_of


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def target(tmp_path):
    """A folder of the user's, to which a planted link leads."""
    folder = tmp_path / "mine"
    (folder / "rows").mkdir(parents=True)
    for name in ("thesis.txt", "results.json", "run.json", "rows/one.jsonl"):
        (folder / name).write_text('{"results": []}')
    return folder


@pytest.mark.parametrize("name", ["_unfinished", "evaluation", "_teacher_text", "_run.owner", "report_figures"])
def test_a_planted_link_is_refused(saved, checkpoint, tmp_path, target, name):
    run, before = tmp_path / "run", snapshot(target)
    shutil.copytree(checkpoint.parent, run, ignore=shutil.ignore_patterns("evaluation", "report_figures", "_run.*"))
    (run / name).symlink_to(target / "thesis.txt" if name == "_run.owner" else target)
    told = f"{run / name} is a link to {target}"
    assert told in refusal(train_gkd.main, command(saved, run, "--max_steps", "2", "--resume_from_checkpoint", "auto"))
    assert told in refusal(eval_gkd.main, [str(run), "--dataset_name", str(ANSWERS)])
    assert told in refusal(report, [str(run)])
    assert snapshot(target) == before


def test_a_link_that_training_would_write_through_is_refused(saved, tmp_path, target):
    """TRL writes its model card at each checkpoint."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "README.md").symlink_to(target / "thesis.txt")
    before = snapshot(target)
    assert f"{run}/README.md is a link to" in refusal(train_gkd.main, command(saved, run, "--max_steps", "1"))
    assert snapshot(target) == before


def test_links_are_replaced_not_followed(saved, checkpoint, tmp_path, target, monkeypatch):
    """A user of the trainer alone, without the command that checks the folder first."""
    run, before = tmp_path / "run", snapshot(target)
    shutil.copytree(checkpoint.parent, run)
    monkeypatch.setattr("gkd.runs.folder.refuse_links", lambda *a, **k: None, raising=False)
    for name in ("_unfinished", "checkpoint-2", "_left-checkpoint-2"):
        (run / name).symlink_to(target)
    (run / "trainer_state.partial").symlink_to(target / "thesis.txt")
    flags = ["--max_steps", "3", "--save_steps", "1", "--save_total_limit", "2", "--resume_from_checkpoint", "auto"]
    train_gkd.main(command(saved, run, *flags))
    assert snapshot(target) == before
    assert not (run / "thesis.txt").exists()
    assert not (run / "_unfinished").is_symlink()
    assert (run / "checkpoint-3/model.safetensors").is_file()


def test_a_picture_takes_the_place_of_no_other_file(tmp_path):
    mine = tmp_path / "plot.partial.png"
    mine.write_text("mine")
    save_figure(new_figure(columns=1, width=4)[0], tmp_path / "plot.png")
    assert {path.name for path in tmp_path.iterdir()} == {"plot.png", "plot.partial.png"}
    assert mine.read_text() == "mine"


def test_a_checkpoint_names_no_file_outside(tmp_path):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    for name in ("../secret", str(tmp_path / "secret")):
        (folder / "checksums.json").write_text(json.dumps({name: {"bytes": 1, "crc32": 0}}))
        assert damage(folder) == f"checksums.json names {name}, which is no file of it"


@pytest.mark.parametrize("how", ["relative", "absolute", "link", "no text", "long"])
def test_results_name_no_file_outside(tmp_path, caplog, how):
    secret = tmp_path / "secret.jsonl"
    secret.write_text(json.dumps(dict.fromkeys(RECORD_FIELDS) | {"row": 0, "text": "secret", "scores": {}}) + "\n")
    rows = tmp_path / "run/evaluation/rows"
    rows.mkdir(parents=True)
    (rows / "link.jsonl").symlink_to(secret)
    name = {"relative": "../../../secret.jsonl", "absolute": str(secret), "link": "link.jsonl", "no text": 3}.get(how)
    name = name or "ä" * 128
    entry = dict.fromkeys(RESULT_FIELDS, 1) | {
        "model": "after",
        "data": "d",
        "settings": "s",
        "records": name,
        "metrics": {},
    }
    (tmp_path / "run/evaluation/results.json").write_text(json.dumps({"results": [entry]}))
    assert records_of(tmp_path / "run", "after", "d", "s") == []
    assert "`records` of 'after' names no file of evaluation/rows: left out." in caplog.text
    entry["records"] = "own.jsonl"
    shutil.copy(secret, rows / "own.jsonl")
    (tmp_path / "run/evaluation/results.json").write_text(json.dumps({"results": [entry]}))
    assert len(records_of(tmp_path / "run", "after", "d", "s")) == 1
