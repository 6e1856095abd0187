"""Shell scripts and YAML files are what they say. The commands of READMEs and docs/: test_docs.py."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from tiny import REPO
from trl.scripts.sft import make_parser

from experiments import quickstart
from gkd.config.parser import GKDParser
from gkd.io.errors import RunStopped

SCRIPTS = sorted((REPO / "experiments").glob("*.sh"))
RUNS = sorted((REPO / "experiments").glob("*.yaml"))
QUICKSTART = [path for path in RUNS if path.name.startswith("quickstart_")]  # experiments/quickstart.py starts these
SCRIPTED = [path for path in RUNS if path not in QUICKSTART]
ENUMS = ("report_to", "lora_target_modules", "lr_scheduler_type", "save_strategy")  # or lists, after parsing


@pytest.mark.parametrize("script", [*SCRIPTS, REPO / ".ci/run"], ids=lambda p: p.name)
def test_shell_scripts_parse_and_are_strict(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in script.read_text()
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize("path", sorted((REPO / "ds_configs").iterdir()), ids=lambda p: p.name)
def test_configs_parse_and_leave_the_optimizer_to_the_command_line(path):
    config = yaml.safe_load(path.read_text())
    assert not {"optimizer", "scheduler"} & config.keys()
    if path.suffix == ".json":
        assert json.loads(path.read_text())["train_batch_size"] == "auto"
    elif "deepspeed_config" in config:
        assert (REPO / config["deepspeed_config"]["deepspeed_config_file"]).is_file()


def flags_of(program, text):
    """Flags of each call of a program in shell text: lists of flags as they stand, other variables as a word."""
    lists = dict(re.findall(r'(?m)^(?:export )?([A-Z]+)=(?:"|\$\{[A-Z]+:-)(--[^"}]*)["}]', text))
    text = re.sub(r"\s*\\\n\s*", " ", text)
    text = text.replace('${DEEPSPEED:+--deepspeed "$DEEPSPEED"}', "")  # the package may be missing here
    text = re.sub(r"\$\{\w+:\+(--(?:[^{}]|\$\{[^}]*\})*)\}", r"\1", text)  # as if the variable were set
    for line in text.splitlines():
        if f"{program} --" in line and not line.lstrip().startswith("#"):
            line = re.sub(r'"\$(@|\{@:\d\})"', "", line.split(program, 1)[1].split(" || ")[0]).replace(
                "$TUNE_FLAGS", ""
            )
            line = re.sub(r"\$([A-Z]+)", lambda m: lists.get(m[1], m[0]).replace("\n", " "), line)
            yield [re.sub(r"\$\{?\w+\}?", "word", word) for word in shlex.split(line)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_train_commands_are_understood(path, monkeypatch):
    for module in ("training", "values", "teacher"):  # bitsandbytes and deepspeed may be missing here
        monkeypatch.setattr(f"gkd.config.{module}.need", lambda *a: None)
    monkeypatch.chdir(REPO)
    commands = list(flags_of("train_gkd.py", path.read_text(encoding="utf-8")))
    assert commands or path.name in (
        "setup.sh",
        "quickstart_cpu.sh",
        "quickstart_gpu.sh",
        "tune_teacher.sh",
        "claim_long.sh",
    )
    goes_on = "The same command goes on" in path.read_text(encoding="utf-8")
    for flags in commands:
        *_, args = GKDParser(prog="train_gkd.py").parse(flags)
        assert args.resume_from_checkpoint == "auto" or not goes_on


def test_tuning_commands_are_understood(monkeypatch):
    """TRL's script would pass over a flag that it does not know."""
    monkeypatch.chdir(REPO)
    (own,) = flags_of("trl.scripts.sft", (REPO / "experiments/tune_teacher.sh").read_text(encoding="utf-8"))
    claim = (REPO / "experiments/claim.sh").read_text(encoding="utf-8").replace("$((256 / COUNT))", "128")
    (whole,) = flags_of("tune_teacher.sh", claim)
    (long,) = flags_of("tune_teacher.sh", (REPO / "experiments/claim_long.sh").read_text(encoding="utf-8"))
    for flags, peft in ((own, True), (own + whole, False), (own + long, False)):
        _, args, model, _ = make_parser().parse_args_and_config([*flags, "--use_cpu"], fail_with_unknown_args=True)
        assert args.completion_only_loss
        assert model.use_peft == peft


@pytest.fixture
def experiments(tmp_path, monkeypatch):
    """A copy of the scripts and their YAML files, in the working folder, and launchers that only print their words."""
    for module in ("training", "values", "teacher"):
        monkeypatch.setattr(f"gkd.config.{module}.need", lambda *a: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    for path in (*SCRIPTS, *RUNS):
        shutil.copy(path, tmp_path / "experiments")
    (tmp_path / "bin").mkdir()
    for name in ("accelerate", "torchrun"):
        (tmp_path / "bin" / name).write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    translated = tmp_path / "runs/translate_zh_en"  # whose stages before are done
    (translated / "teacher").mkdir(parents=True)
    (translated / "held_out.jsonl").touch()
    (translated / "teacher/adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
    for name in ("STUDENT", "TEACHER", "DATA", "OUT", "CONFIG", "DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "experiments"


def started(script, *flags, **variables):
    """The words of the launcher that a script calls."""
    nodes = {"NODES": "2", "RANK": "0", "GPUS": "8", "MASTER": "host:29500"}
    environment = os.environ | nodes | variables
    environment["PATH"] = f"{script.parent.parent}/bin:{environment['PATH']}"
    done = subprocess.run([script, *flags], env=environment, capture_output=True, text=True, check=True)
    stopped = "The training was stopped; the same command goes on with it."  # printed by translate_zh_en.sh
    program, *words = [line for line in done.stdout.splitlines() if line != stopped]
    return [program.rpartition("/")[2], *words]


def required(path):
    """The variable that the tuning asks for."""
    return {"DATA": "FOLDER"} if path.name == "tune_teacher.yaml" else {}


def command_on_top(path):
    """Of a YAML file: the indented lines of its first comment."""
    head = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return shlex.split(" ".join(line[1:].rstrip("\\") for line in head if line.startswith("#   ")))


def split(words):
    """What starts the program, with its name, and its flags, without DeepSpeed's, whose package may be missing here."""
    at = words.index("--config")
    flags = words[at:]
    if "--deepspeed" in flags:
        place = flags.index("--deepspeed")
        assert flags[place + 1] == "ds_configs/zero2.json"
        del flags[place : place + 2]
    return words[:at], flags


def parsed(path, flags):
    """All settings by name, as train_gkd.py has them, or TRL's script of SFT, which tunes teachers."""
    if path.name == "tune_teacher.yaml":
        parts = make_parser().parse_args_and_config([*flags, "--use_cpu"], fail_with_unknown_args=True)[:3]
    else:
        parts = GKDParser(prog="train_gkd.py").parse(flags)
    return {name: value for part in parts for name, value in vars(part).items()}


@pytest.mark.parametrize("path", SCRIPTED, ids=lambda p: p.stem)
def test_a_run_is_started_by_the_command_on_top_of_its_file_and_by_its_script(path, experiments):
    (start, flags), (start_by_script, flags_by_script) = (
        split(words) for words in (command_on_top(path), started(experiments / f"{path.stem}.sh", **required(path)))
    )
    assert start == start_by_script
    assert flags[:2] == ["--config", f"experiments/{path.name}"]
    settings, by_script = parsed(path, flags), parsed(path, flags_by_script)
    assert {name for name, value in settings.items() if repr(value) != repr(by_script[name])} == set()
    for name, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        assert name in by_script
        if name not in ENUMS:
            assert by_script[name] == value, name


@pytest.mark.parametrize("path", QUICKSTART, ids=lambda p: p.stem)
def test_the_quickstart_starts_the_command_on_top_of_each_file(path, monkeypatch):
    monkeypatch.chdir(REPO)
    calls = []
    monkeypatch.setattr(quickstart, "call", lambda *words: calls.append([str(word) for word in words]))
    monkeypatch.setattr(quickstart, "REPO", Path())
    on_top = command_on_top(path)
    settings = parsed(path, split(on_top)[1])
    plan = quickstart.GPU if path.name.startswith("quickstart_gpu_") else quickstart.CPU
    models = (Path(settings[name]) for name in ("model_name_or_path", "teacher_model_name_or_path"))
    with pytest.raises(RunStopped):  # nothing has trained
        quickstart.train(*models, Path(settings["output_dir"]), Path(settings["dataset_name"]), plan)
    ((_, _, launcher, *words),) = calls
    assert (launcher, words[: words.index("--config") + 2]) == ("accelerate.commands.launch", on_top[2:])
    assert {name: repr(value) for name, value in parsed(path, split(words)[1]).items()} == {
        name: repr(value) for name, value in settings.items()
    }


@pytest.mark.parametrize("path", SCRIPTED, ids=lambda p: p.stem)
def test_variables_and_flags_override_a_runs_file(path, experiments):
    variables = {"STUDENT": "a student", "TEACHER": "a teacher", "DATA": "some rows", "OUT": "an out"}
    flags = ["--learning_rate", "0.5", "--gradient_checkpointing", "False", "--logging_steps", "77"]
    if path.name == "translate_zh_en.yaml":  # makes its rows itself
        (experiments.parent / "an out/teacher").mkdir(parents=True)
        (experiments.parent / "an out/held_out.jsonl").touch()
        variables["TEACHER_TUNED"] = "runs/translate_zh_en/teacher"
        data, out = "an out/rows/train.jsonl", "an out/run"
    else:
        data, out = "some rows", "an out"
    settings = parsed(path, split(started(experiments / f"{path.stem}.sh", *flags, **variables))[1])
    if path.name == "tune_teacher.yaml":
        assert settings["model_name_or_path"] == "a teacher"
    else:
        assert settings["model_name_or_path"] == "a student"
        assert settings["teacher_model_name_or_path"] == "a teacher"
    assert (settings["dataset_name"], settings["output_dir"]) == (data, out)
    assert (settings["learning_rate"], settings["gradient_checkpointing"], settings["logging_steps"]) == (
        0.5,
        False,
        77,
    )
    last = parsed(path, split(started(experiments / f"{path.stem}.sh", "--output_dir", "mine", **variables))[1])
    assert last["output_dir"] == "mine"
    assert last["learning_rate"] == yaml.safe_load(path.read_text(encoding="utf-8"))["learning_rate"]
