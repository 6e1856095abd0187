"""Code in models, checkpoints and data does not run, files that data name are not opened, secrets stay where they are."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPO, ROWS
from datasets import Dataset, Features, Image, Value
from peft import LoraConfig, get_peft_model
from tiny import make_model

import convert_data
import eval_gkd
import export_model
import train_gkd
from gkd.cli import chat, evaluate
from gkd.cli.report import main as report
from gkd.config.evaluation import EvalArguments
from gkd.config.training import DataArguments, GKDArguments, StudentArguments
from gkd.data.loading import check_rows, load_rows
from gkd.data.rows import DataError
from gkd.io.files import new_figure, save_figure
from gkd.io.pickles import check_checkpoint, load_as_data
from gkd.io.secrets import is_secret, public, without_secrets
from gkd.runs import fields as record_fields
from gkd.runs.checkpoints import damage, seal
from gkd.runs.results import RECORD_FIELDS, RESULT_FIELDS, read_results, records_of
from gkd.teachers.cache import TeacherCache

ANSWERS = REPO / "data/sample_answers.json"
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


# ---------------------------------------------------------------------- code that comes with a model


@pytest.fixture
def bring_code(saved, tmp_path, monkeypatch):
    """A function that lets the student's or teacher's folder bring code, which makes a folder `ran` when it is imported."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def bring(role):
        folder = tmp_path / f"{tmp_path.name}_{role}"  # transformers keeps modules by the folder's name
        shutil.copytree(saved / role, folder)
        (folder / "theirs.py").write_text(
            f"import os\nos.makedirs({str(tmp_path / 'ran')!r}, exist_ok=True)\n"
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class TheirConfig(LlamaConfig):\n    model_type = 'theirs'\n"
            "class Theirs(LlamaForCausalLM):\n    config_class = TheirConfig\n"
        )
        path = folder / "config.json"
        config = json.loads(path.read_text()) | {"model_type": "theirs", "architectures": ["Theirs"]}
        config["auto_map"] = {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.Theirs"}
        path.write_text(json.dumps(config))
        return folder

    return bring


def stop(*args):
    raise SystemExit("it went on")


FLAGS = {"student": "--trust_remote_code", "teacher": "--teacher_trust_remote_code"}


@pytest.mark.parametrize("role", FLAGS)
@pytest.mark.parametrize("program", ["train_gkd", "eval_gkd", "chat"])
def test_the_code_of_a_model_runs_only_if_its_own_flag_asks(saved, tmp_path, bring_code, monkeypatch, program, role):
    models = {"student": saved / "student", "teacher": saved / "teacher"} | {role: bring_code(role)}
    pair = [models["student"], "--teacher_model_name_or_path", models["teacher"], "--dataset_name", ANSWERS]
    call, words = {
        "train_gkd": (train_gkd.main, ["--model_name_or_path", *pair, "--output_dir", tmp_path / "out", *FAST]),
        "eval_gkd": (eval_gkd.main, ["--models", *pair, "--output_dir", tmp_path / "out"]),
        "chat": (chat.main, ["--student", models["student"], "--teacher", models["teacher"]]),
    }[program]
    words = [str(word) for word in words]
    monkeypatch.setattr("gkd.models.loading.load_student", stop)
    monkeypatch.setattr("gkd.models.loading.load_teacher", stop)
    monkeypatch.setattr("gkd.cli.chat.read_prompts", stop)  # after its models have loaded
    other = next(flag for of, flag in FLAGS.items() if of != role)
    for more in ([], [other]):
        said = refusal(call, [*words, *more])
        assert str(models[role]) in said
        assert "custom code" in said
        assert not (tmp_path / "ran").exists()
    assert refusal(call, [*words, FLAGS[role]]) == "it went on"
    assert (tmp_path / "ran").is_dir()


def test_export_runs_the_code_of_a_student_only_if_asked(bring_code, tmp_path):
    words = [str(bring_code("student")), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert "trust_remote_code" in refusal(export_model.main, words)
    assert not (tmp_path / "ran").exists()
    export_model.main([*words, "--trust_remote_code"])
    assert (tmp_path / "ran").is_dir()


# ---------------------------------------------------------------------- what a record may set


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


@pytest.mark.parametrize("how", ["-m gkd", "as accelerate launches it"])
@pytest.mark.parametrize("name", ["run.json", "config.json"])
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


# ---------------------------------------------------------------------- pickles


@pytest.fixture(scope="module")
def checkpoint(saved, tmp_path_factory):
    """A run of one step with its checkpoint."""
    out = tmp_path_factory.mktemp("run") / "run"
    train_gkd.main(command(saved, out, "--max_steps", "1", "--save_steps", "1"))
    return out / "checkpoint-1"


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


@pytest.mark.parametrize("part", ["student", "teacher", "student_adapter"])
def test_code_in_pickled_weights_does_not_run(saved, tmp_path, part):
    trap = tmp_path / "ran"
    for name in ("student", "teacher"):
        shutil.copytree(saved / name, tmp_path / name)
    folder, name = tmp_path / part, "pytorch_model.bin"
    if part == "student_adapter":
        folder.mkdir()
        adapter = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        adapter["base_model_name_or_path"] = str(tmp_path / "student")
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
        name = "adapter_model.bin"
    else:
        (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Runs(trap)}, folder / name)
    more = ["--student_adapter", folder] if part == "student_adapter" else []
    told = [refusal(train_gkd.main, command(tmp_path, tmp_path / "out", *more))]
    both = ["--teacher_model_name_or_path", str(tmp_path / "teacher"), "--dataset_name", str(ANSWERS)]
    student = folder if more else tmp_path / "student"
    told.append(refusal(eval_gkd.main, ["--models", str(student), *both, "--output_dir", str(tmp_path / "e")]))
    told.append(refusal(chat.main, ["--student", str(folder)]))
    for said in told:
        assert f"{folder / name} is refused: it names" in said
    assert not trap.exists()


def test_code_in_the_weights_of_an_adapters_base_does_not_run(saved, tmp_path):
    trap = tmp_path / "ran"
    shutil.copytree(saved / "student", tmp_path / "base")
    get_peft_model(make_model(), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    path.write_text(json.dumps(config))
    (tmp_path / "base/model.safetensors").unlink()
    torch.save({"model.norm.weight": Runs(trap)}, tmp_path / "base/pytorch_model.bin")
    adapter = str(tmp_path / "adapter")
    for call, words in (
        (export_model.main, [adapter, "-o", str(tmp_path / "exported"), "--device", "cpu"]),
        (chat.main, ["--student", adapter]),
    ):
        assert "base/pytorch_model.bin is refused: it names" in refusal(call, words)
    assert not trap.exists()


def test_good_pickled_weights_are_taken(saved, tmp_path):
    shutil.copytree(saved / "student", tmp_path / "student")
    (tmp_path / "student/model.safetensors").unlink()
    torch.save(make_model(seed=0).state_dict(), tmp_path / "student/pytorch_model.bin")
    shutil.copytree(saved / "teacher", tmp_path / "teacher")
    train_gkd.main(command(tmp_path, tmp_path / "out", "--max_steps", "1", "--save_strategy", "no"))
    assert (tmp_path / "out/model.safetensors").is_file()


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


# ---------------------------------------------------------------------- links and names that lead elsewhere


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


def test_code_behind_a_link_in_a_checkpoint_does_not_run(tmp_path):
    """FSDP's and DeepSpeed's folders are read through a link, which a search for pickles passes by."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/.metadata").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1/pytorch_model_fsdp_0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="pytorch_model_fsdp_0 is refused: it is a link to a folder"):
        check_checkpoint(tmp_path / "checkpoint-1")
    assert not (tmp_path / "ran").exists()


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


# ---------------------------------------------------------------------- files and addresses in data

_opened: list[str] = []


def _note(event, arguments):
    if event in ("open", "socket.connect", "socket.getaddrinfo"):
        _opened.append(str(arguments))


@pytest.fixture
def opened():
    """Files opened and addresses connected to since the fixture was requested."""
    if not getattr(sys, "_gkd_notes_opened", False):
        sys.addaudithook(_note)
        sys._gkd_notes_opened = True
    _opened.clear()
    return _opened


def write_parquet(path, columns, kinds):
    """A Parquet file whose metadata, as datasets writes it, says that the columns `kinds` are of these kinds."""
    table = pa.table(columns)
    features = Features({name: kinds.get(name) or Value("string") for name in columns})
    info = {"info": {"features": features.to_dict()}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("where", ["file", "address"])
def test_a_path_in_a_row_is_not_opened(tmp_path, opened, capsys, where, streaming):
    secret = tmp_path / "private.png"
    secret.write_text("private")
    place = str(secret) if where == "file" else "http://127.0.0.1:9/private.png"
    cells = pa.array([{"bytes": None, "path": place}] * 2, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    columns = {"prompt": ["one?", "two?"], "completion": ["1", "2"], "picture": cells}
    path = write_parquet(tmp_path / "rows.parquet", columns, {"picture": Image()})
    opened.clear()
    rows = load_rows(path, "train", streaming=streaming)
    check_rows(rows, path, needs_answers=True)
    assert list(rows) == [{"prompt": "one?", "completion": "1"}, {"prompt": "two?", "completion": "2"}]
    assert "rows.parquet: left out, being no text: picture." in capsys.readouterr().err
    convert_data.main([path, "-o", str(tmp_path / "converted.jsonl")])
    said = "".join(opened)
    assert "rows.parquet" in said
    assert "private.png" not in said
    assert "127.0.0.1" not in said


@pytest.mark.parametrize("nested", [False, True])
def test_a_path_in_a_column_that_is_needed_is_refused(tmp_path, opened, nested):
    secret = tmp_path / "private.png"
    secret.write_text("private")
    cell = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    value = {"bytes": None, "path": str(secret)}
    kind, cells = Image(), pa.array([value], cell)
    if nested:
        kind = [{"role": Value("string"), "content": Image()}]
        message = pa.struct({"role": pa.string(), "content": cell})
        cells = pa.array([[{"role": "user", "content": value}]], pa.list_(message))
    name = "messages" if nested else "prompt"
    path = write_parquet(tmp_path / "rows.parquet", {name: cells}, {name: kind})
    opened.clear()
    with pytest.raises(DataError, match=f"column '{name}' holds images, sound or other files; gkd reads text only"):
        load_rows(path, "train")
    assert "private.png" not in "".join(opened)


@pytest.mark.parametrize("saved_to_disk", [False, True])
def test_a_folder_of_images_is_not_opened(tmp_path, opened, saved_to_disk):
    folder = tmp_path / "folder"
    if saved_to_disk:
        data = Dataset.from_dict({"text": ["a"], "image": [{"path": str(tmp_path / "private.png"), "bytes": None}]})
        data = data.cast(Features({"text": Value("string"), "image": Image()}))
        (tmp_path / "private.png").write_text("private")
        data.save_to_disk(folder)
    else:
        folder.mkdir()
        for number in range(3):
            (folder / f"private{number}.png").write_text("private")
    opened.clear()
    said = "row 0: neither `messages` nor `prompt`" if saved_to_disk else "column 'image' holds images"
    with pytest.raises(DataError, match=said):
        check_rows(load_rows(str(folder), "train"), str(folder), needs_answers=False)
    assert "private" not in "".join(opened)


def test_a_hub_dataset_that_names_files_is_converted_without_them(tmp_path, opened, monkeypatch):
    (tmp_path / "private.png").write_text("private")
    cells = [{"path": str(tmp_path / "private.png"), "bytes": None}]
    features = Features({"prompt": Value("string"), "image": Image()})
    data = Dataset.from_dict({"prompt": ["a"], "image": cells}).cast(features).to_iterable_dataset()
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: data)
    opened.clear()
    convert_data.main(["theirs/rows", "-o", str(tmp_path / "rows.jsonl")])
    assert json.loads((tmp_path / "rows.jsonl").read_text())["messages"][0]["content"] == "a"
    assert "private" not in "".join(opened)


# ---------------------------------------------------------------------- secrets


def test_secrets_are_known_by_name():
    for name in ("--hub_token", "--hub-token", "token", "HF_TOKEN", "api_key", "aws_secret", "db_password"):
        assert is_secret(name), name
    for name in ("--eos_token", "pad_token", "max_new_tokens", "tokenizer", "output_dir", "push_to_hub"):
        assert not is_secret(name), name
    assert public({"a": [{"token": 1, "b": (2,)}], "hub_token": 3}) == {"a": [{"b": (2,)}]}


def test_a_command_line_is_shown_without_secrets():
    words = ["train_gkd.py", "--hub_token", "S1", "--eos_token", "</s>", "--hub-token=S2", "--lmbda", "0.5"]
    words += ["--model_init_kwargs", '{"token": "S3", "dtype": "auto"}', '--teacher_model_init_kwargs={"token":"S4"}']
    words += ["--chat_template_kwargs", '{"a":  1}', "--model_init_kwargs", '{"token": "S5"']
    shown = without_secrets(words)
    assert not any(f"S{n}" in word for n in range(1, 6) for word in shown)
    assert len(shown) == len(words)
    assert [a for a, b in zip(words, shown, strict=True) if a == b] == [
        *("train_gkd.py", "--hub_token", "--eos_token", "</s>", "--lmbda", "0.5", "--model_init_kwargs"),
        *("--chat_template_kwargs", '{"a":  1}', "--model_init_kwargs"),
    ]


def test_arguments_keep_their_secrets_to_themselves(tmp_path):
    args = GKDArguments(output_dir=str(tmp_path), hub_token="hf_SECRET", model_init_kwargs={"token": "hf_SECRET"})
    assert args.hub_token == args.model_init_kwargs["token"] == "hf_SECRET"
    for text in (repr(args), str(args), args.to_json_string(), str(args.to_sanitized_dict())):
        assert "hf_SECRET" not in text
    assert b"hf_SECRET" not in pickle.dumps(args)
    assert pickle.loads(pickle.dumps(args)).beta == args.beta


def test_nothing_that_a_run_leaves_holds_a_secret(saved, tmp_path, capfd):
    out = tmp_path / "run"
    held_out = tmp_path / "rows.json"
    held_out.write_text(json.dumps(ROWS[:2]))
    kwargs = '{"token": "hf_SECRET"}'
    flags = ["--hub_token", "hf_SECRET", "--model_init_kwargs", kwargs, "--teacher_model_init_kwargs", kwargs]
    flags += ["--report_to", "tensorboard", "--max_steps", "1", "--save_steps", "1", "--use_peft", "--lora_r", "4"]
    train_gkd.main(command(saved, out, *flags, "--eval_dataset_name", held_out))
    eval_gkd.main([str(out), "--teacher_model_init_kwargs", kwargs, "--checkpoints"])
    export_model.main([str(out), "-o", str(tmp_path / "exported"), "--device", "cpu"])
    files = [path for folder in (out, tmp_path / "exported") for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"training_args.bin", "run.json", "report.html", "README.md", "adapter_config.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    for path in files:
        assert b"hf_SECRET" not in path.read_bytes(), path
    assert "hf_SECRET" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "flags",
    [
        ["--hub_tokn", "hf_SECRET"],
        ["--model_init_kwargs", '{"token": "hf_SECRET"'],
        ["--hub_token", "hf_SECRET", "--lmbda", "2"],
    ],
)
def test_a_refused_command_line_does_not_repeat_secrets(saved, tmp_path, capfd, flags):
    refusal(train_gkd.main, command(saved, tmp_path / "out", *flags))
    refusal(eval_gkd.main, ["--models", "m", "--output_dir", "o", *flags])
    said = "".join(capfd.readouterr())
    assert "error:" in said
    assert "hf_SECRET" not in said
