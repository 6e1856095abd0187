"""What a record that somebody sent may set: flags that are data, and nothing that runs code."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
from commands import ANSWERS
from hostile import command, refusal
from tiny import REPO, ROWS

import eval_gkd
import train_gkd
from gkd.cli import evaluate
from gkd.config import recorded as record_fields
from gkd.config.evaluation import EvalArguments
from gkd.config.training import DataArguments, GKDArguments, StudentArguments
from gkd.runs.results import read_results
from gkd.teachers.cache import TeacherCache


def write_record(folder, **arguments):
    """`run.json` as somebody may have sent it."""
    known = {"model_name_or_path": "s", "teacher_model_name_or_path": "t", "dataset_name": str(ANSWERS)}
    (folder / "run.json").write_text(json.dumps({"arguments": known | arguments}))
    return evaluate.parse([str(folder), "--dataset_name", str(ANSWERS)])


HARMLESS = {"dtype": "float32", "revision": "main", "subfolder": "x", "variant": "fp16", "attn_implementation": "sdpa"}


@pytest.mark.parametrize(
    "theirs",
    [
        {"trust_remote_code": True},
        {"weights_only": False},
        {"allow_all_kernels": True},
        {"use_kernels": True},
        {"attn_implementation": "org/kernel"},
        {"attn_implementation": {"": "org/kernel"}},
        {"quantization_config": {"quant_method": "gptq"}},
        {"code_revision": "main"},
        {"device_map": "auto"},
        {"use_safetensors": False},
        {"dtype": "load"},
        {"subfolder": ["x"]},
    ],
    ids=str,
)
def test_a_record_says_nothing_that_lets_code_of_a_teacher_run(tmp_path, theirs):
    args = write_record(tmp_path, teacher_model_init_kwargs=HARMLESS | theirs)
    assert args.teacher_model_init_kwargs == {k: v for k, v in HARMLESS.items() if k not in theirs}
    assert args.left_out == [f"{next(iter(theirs))} of --teacher_model_init_kwargs"]
    kwargs = json.dumps(theirs)  # typed, it counts
    typed = evaluate.parse([str(tmp_path), "--dataset_name", "x", "--teacher_model_init_kwargs", kwargs])
    assert typed.teacher_model_init_kwargs == theirs


def test_a_record_sets_what_it_may_and_nothing_else(tmp_path):
    names = {item.name for kind in (EvalArguments, GKDArguments, StudentArguments) for item in fields(kind)}
    args = write_record(tmp_path, **dict.fromkeys(names - record_fields._FLAGS.keys(), "THEIRS"))
    assert "THEIRS" not in [*vars(args).values(), *args.trained.values()]
    args = write_record(tmp_path, trust_remote_code=True, teacher_trust_remote_code=True)
    assert (args.trust_remote_code, args.teacher_trust_remote_code) == (False, False)
    assert args.left_out == ["--trust_remote_code", "--teacher_trust_remote_code"]
    args = evaluate.parse([str(tmp_path), "--dataset_name", "x", "--trust_remote_code"])
    assert args.trust_remote_code
    assert (args.left_out, args.teacher_trust_remote_code) == (["--teacher_trust_remote_code"], False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta": "0.5"},
        {"max_new_tokens": True},
        {"teacher_dtype": "load"},
        {"dataset_name": ["x"]},
        {"chat_template_kwargs": {"a = 1 %}{{ 2": 3}},
        {"metrics": ["\x1b[2J"]},
        {"beta": None},
        {"divergence": "kl"},
        {"divergence": None},
        {"skew_alpha": "0.1"},
        {"max_new_tokens": None},
        {"load_in_4bit": None},
        {"train_on": None},
    ],
    ids=str,
)
def test_a_value_of_another_kind_is_refused(tmp_path, capsys, wrong):
    with pytest.raises(SystemExit):
        write_record(tmp_path, **wrong)
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path}/run.json: " in said
    assert f"is no value of --{next(iter(wrong))}" in said
    assert "\x1b" not in said


def test_null_is_a_value_of_flags_that_may_be_left_out(tmp_path):
    assert write_record(tmp_path, max_length=None, dataset_config=None).max_length is None


def test_a_record_without_arguments_names_no_data(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"arguments": {}}')
    with pytest.raises(SystemExit):
        evaluate.parse([str(tmp_path)])
    assert f"{tmp_path}: the record names no data: give --dataset_name." in capsys.readouterr().err


@pytest.fixture
def scorer(tmp_path, monkeypatch):
    """A module `planted` in a folder that is the current one: importing it leaves a trace, as does its function."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "planted", raising=False)

    def plant(folder):
        (folder / "planted.py").write_text(
            f"import os\nos.makedirs({str(tmp_path / 'ran')!r}, exist_ok=True)\ndef score(completion, row):\n    return 1\n"
        )
        monkeypatch.chdir(folder)

    return plant


def test_a_scorer_counts_only_if_it_is_typed(saved, checkpoint, tmp_path, capsys, scorer):
    """`builtins:exec` would run the completions that lie in the folder."""
    run, rows = tmp_path / "run", tmp_path / "rows.json"
    shutil.copytree(checkpoint.parent, run)
    rows.write_text(json.dumps(ROWS[:2]))
    record = json.loads((run / "run.json").read_text())
    scorer(run)
    words = [str(run), "--dataset_name", str(rows)]
    for theirs in ("builtins:exec", "planted:score"):
        record["arguments"] |= {"scorer": theirs, "metrics": ["exact_match"]}
        (run / "run.json").write_text(json.dumps(record))
        eval_gkd.main(words)
        told = f"left out: --scorer {theirs}. Type them again to have them."
        assert told in capsys.readouterr().err
        names = {name for result in read_results(run) for name in result["metrics"] if name.startswith("score/")}
        assert names == {"score/exact_match"}
    said = (refusal(eval_gkd.main, [*words, "--scorer", "planted:score"]), capsys.readouterr().err)[1]
    assert (
        f"{run} holds a run or an adapter, so no module is taken from it: start from the folder of planted.py" in said
    )
    assert not (tmp_path / "ran").exists()

    (tmp_path / "own").mkdir()
    (tmp_path / "own/json.py").write_text("raise SystemExit('an installed module is hidden')")
    scorer(tmp_path / "own")
    eval_gkd.main([*words, "--scorer", "planted:score"])
    assert (tmp_path / "ran").is_dir()
    assert sys.path[-1] == str(tmp_path / "own")
    assert {r["model"] for r in read_results(run) if "score/score" in r["metrics"]} == {"teacher", "before", "after"}


@pytest.mark.parametrize(("name", "how"), [("run.json", "-m gkd"), ("config.json", "as accelerate launches it")])
def test_no_module_of_a_folder_is_imported(tmp_path, name, how):
    """`python -m` puts the current folder first, and accelerate's launcher of DeepSpeed puts it into PYTHONPATH."""
    (tmp_path / name).write_text("{}")
    (tmp_path / "transformers.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    words = [sys.executable, "-m", "gkd", "report", "."]
    if how != "-m gkd":
        environment["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"
        words[1:3] = [str(REPO / "gkd/__main__.py")]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "so there is nothing to report" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("how", ["flag", "config"])
def test_training_takes_the_scorer_that_was_typed(saved, tmp_path, scorer, how):
    (tmp_path / "own").mkdir()
    scorer(tmp_path / "own")
    flags = ["--scorer", "planted:score"]
    if how == "config":
        (tmp_path / "flags.yaml").write_text("scorer: planted:score\n")
        flags = ["--config", tmp_path / "flags.yaml"]
    held_out = tmp_path / "rows.json"
    held_out.write_text(json.dumps(ROWS[:1]))
    flags += ["--eval_dataset_name", held_out, "--max_steps", "1", "--save_strategy", "no"]
    train_gkd.main(command(saved, tmp_path / "run", *flags))
    assert all("score/score" in result["metrics"] for result in read_results(tmp_path / "run"))


def test_a_teacher_cache_settles_its_own_flags_alone(tmp_path):
    theirs = {"trust_remote_code": True, "scorer": "builtins:exec", "output_dir": "/elsewhere", "hub_token": "x"}
    theirs |= {"max_new_tokens": 7, "teacher_model_init_kwargs": {"allow_all_kernels": True, "dtype": "float32"}}
    manifest = {"version": 1, "settings": {"flags": theirs, "text": {"writer": "dataset"}}, "count": 0, "shards": []}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    data, args = DataArguments(), GKDArguments(output_dir="here")
    TeacherCache(str(tmp_path)).settle(data, args, set())
    assert (args.trust_remote_code, args.scorer, args.output_dir, args.hub_token) == (False, None, "here", None)
    assert (args.max_new_tokens, args.teacher_model_init_kwargs) == (7, {"dtype": "float32"})
    for wrong in ({"max_new_tokens": "x"}, {"chat_template_kwargs": {"a %}": 1}}):
        manifest["settings"]["flags"] = wrong
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=f"manifest.json: .* is no value of --{next(iter(wrong))}"):
            TeacherCache(str(tmp_path)).settle(data, args, set())
    manifest |= {"count": 1, "shards": [{"name": "../../other.parquet", "sha256": ""}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="names '../../other.parquet', which is no file of its shards"):
        TeacherCache(str(tmp_path))
