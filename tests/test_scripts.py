"""Shell scripts and YAML files are what they say. The commands of READMEs and docs/: test_docs.py."""

import json
import re
import shlex
import subprocess

import pytest
import yaml
from conftest import REPO
from trl.scripts.sft import make_parser

from gkd.config.parser import GKDParser

SCRIPTS = sorted((REPO / "experiments").glob("*.sh"))


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
    lists = dict(re.findall(r'(?m)^(?:export )?([A-Z]+)="(--[^"]*)"', text))
    text = re.sub(r"\s*\\\n\s*", " ", text)
    for line in text.splitlines():
        if f"{program} --" in line and not line.lstrip().startswith("#"):
            line = re.sub(r'"\$(@|\{@:\d\})"', "", line.split(program, 1)[1].split(" || ")[0]).replace(
                "$TUNE_FLAGS", ""
            )
            line = re.sub(r"\$([A-Z]+)", lambda m: lists.get(m[1], m[0]).replace("\n", " "), line)
            yield [re.sub(r"\$\{?\w+\}?", "word", word) for word in shlex.split(line)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_train_commands_are_understood(path, monkeypatch):
    monkeypatch.setattr("gkd.config.values.need", lambda *a: None)  # bitsandbytes and deepspeed may be missing here
    commands = list(flags_of("train_gkd.py", path.read_text(encoding="utf-8")))
    assert commands or path.name in ("setup.sh", "quickstart_cpu.sh", "tune_teacher.sh")
    for flags in commands:
        GKDParser(prog="train_gkd.py").parse(flags)


def test_tuning_commands_are_understood():
    """TRL's script would pass over a flag that it does not know."""
    (own,) = flags_of("trl.scripts.sft", (REPO / "experiments/tune_teacher.sh").read_text(encoding="utf-8"))
    claim = (REPO / "experiments/claim.sh").read_text(encoding="utf-8").replace("$((256 / COUNT))", "128")
    (whole,) = flags_of("tune_teacher.sh", claim)
    for flags, peft in ((own, True), (own + whole, False)):
        _, args, model, _ = make_parser().parse_args_and_config([*flags, "--use_cpu"], fail_with_unknown_args=True)
        assert args.completion_only_loss
        assert model.use_peft == peft
