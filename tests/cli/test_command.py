"""Ends of commands: a full disk, Ctrl-C, SIGTERM and a closed terminal give one line each, and leave no partial files."""

import fcntl
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import termios
from contextlib import contextmanager

import pytest
from commands import command
from progress import finish
from progress import run as run_command
from tiny import REPO, ROWS

import cache_teacher
import eval_gkd
import export_model
import gkd.cli.report
import gkd.cli.shrink
import gkd.cli.train
import gkd.evaluation.evaluator
import gkd.export.exporter
import gkd.report.write
import gkd.teachers.cache_files
import train_gkd
from gkd.runs.checkpoints import damage
from gkd.runs.results import read_results
from gkd.training.trainer import GKDTrainer


def train(saved, folder, out, *more):
    fixed = ["--eval_dataset_name", folder / "rows.json", "--lmbda", 0, "--max_steps", 2, "--save_steps", 1]
    words = [*command(saved, folder / "rows.json", out), *fixed, "--preflight", "off", *more]
    train_gkd.main([str(word) for word in words])


@pytest.fixture(scope="module")
def work(saved, tmp_path_factory):
    """`rows.json`, and a `run` with held-out rows, evaluated before and after."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    train(saved, folder, folder / "run")
    return folder


def full_disk(*_):
    """Makes every `write` to a file fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


@contextmanager
def ends():
    """Expects SystemExit and yields its code; the disk is writable again afterwards."""
    try:
        with pytest.raises(SystemExit) as stop:
            yield stop
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def interrupt(monkeypatch, owner, name, happens):
    """Runs an action, with the same arguments, before each call of this function or method."""
    function = getattr(owner, name)

    def interrupted(*args, **kwargs):
        happens(*args)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


# Each command with its arguments, a function that it calls during writing, and the file that it then writes.
# fmt: off
COMMANDS = {
    "eval_gkd.py": (eval_gkd.main, "{run} --output_dir {out}", (gkd.evaluation.evaluator.Evaluation, "_scores"), "evaluation/rows/"),
    "export_model.py": (export_model.main, "{run} -o {out}/model", (gkd.export.exporter, "_complete_generation_config"), "model"),
    "cache_teacher.py": (cache_teacher.main, "--model_name_or_path {models}/student --teacher_model_name_or_path "
        "{models}/teacher --dataset_name {rows} --output_dir {out} --max_length 90 --max_new_tokens 9",
        (gkd.teachers.cache_files.Dataset, "from_dict"), "00000.parquet"),
    "gkd report": (gkd.cli.report.main, "{run} -o {out}", (gkd.report.write, "_save_pictures"), "report_figures/"),
    "gkd shrink": (gkd.cli.shrink.main, "{models}/teacher -o {out}/small --layers 2", (gkd.cli.shrink, "shrink"), "small"),
}
# fmt: on


@pytest.mark.parametrize("happens", ["full disk", "SIGINT", "SIGTERM"])
@pytest.mark.parametrize("program", COMMANDS)
def test_a_command_ends_in_one_line(saved, work, tmp_path, monkeypatch, capsys, program, happens):
    main, words, inside, file = COMMANDS[program]
    names = {"run": work / "run", "out": tmp_path / "out", "rows": work / "rows.json", "models": saved}
    monkeypatch.setattr(sys, "argv", [program, *words.format(**names).split()])
    happen = full_disk if happens == "full disk" else lambda *_: os.kill(os.getpid(), getattr(signal, happens))
    interrupt(monkeypatch, *inside, happen)
    with ends() as stop:
        main()
    if happens == "full disk":
        said = str(stop.value.code)
        assert said.startswith(f"{program}: ")
        assert "File too large" in said
        assert "see ulimit -f." in said
        assert file in said
        assert "\n" not in said
    else:
        assert stop.value.code == 128 + getattr(signal, happens)
        name = "Ctrl-C" if happens == "SIGINT" else happens
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"{program}: stopped by {name}. ")
    left = [path for path in tmp_path.rglob("*") if path.suffix == ".partial" or path.name.startswith(".")]
    assert left == []
    assert not (tmp_path / "out/model").exists()
    assert not (tmp_path / "out/small").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        ((GKDTrainer, "evaluate"), r"/evaluation/rows/\w+.jsonl'. .* gkd report"),
        ((GKDTrainer, "save_state"), "/trainer_state.json'. .* gkd report"),
        ((gkd.cli.train, "write_report"), "/report_figures/.*.svg'. .* gkd report"),
    ],
    ids=["evaluation", "state", "report"],
)
def test_a_full_disk_after_training_keeps_the_model(saved, work, tmp_path, monkeypatch, capsys, inside, said):
    interrupt(monkeypatch, *inside, lambda first, *_: getattr(first, "is_in_train", False) or full_disk())
    with ends() as stop:
        train(saved, work, tmp_path / "run")
    assert re.fullmatch(rf"train_gkd.py: \[Errno 27\] File too large: .*{said} .*", stop.value.code)
    assert f"The model in {tmp_path}/run is whole" in stop.value.code
    assert (tmp_path / "run/model.safetensors").is_file()
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_a_full_disk_in_an_evaluation_between(saved, work, tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, GKDTrainer, "evaluate", lambda self, *_: self.state.global_step == 2 and full_disk())
    with ends() as stop:
        train(saved, work, tmp_path / "run", "--eval_strategy", "steps", "--eval_steps", 1)
    assert re.search(r"evaluation could not be written: .*/rows/.*checkpoint-1 is whole: go on", stop.value.code)
    assert damage(tmp_path / "run/checkpoint-1") is None
    assert {result["model"] for result in read_results(tmp_path / "run")} == {"before", "teacher", "step 1"}


def test_ctrl_c_while_libraries_load():
    code = (
        "import os, signal\nfrom gkd.cli.start import quiet_imports\nquiet_imports('eval_gkd.py')\n"
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    done = run_command([sys.executable, "-c", code], cwd=REPO)
    assert (done.returncode, done.stderr) == (130, "\neval_gkd.py: stopped by Ctrl-C.\n")


def test_a_closed_terminal_saves(saved, work, tmp_path, monkeypatch):
    """The real command, whose terminal closes during the run: from then on, writing to it raises."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    more = ["--lmbda", "0", "--max_steps", "400", "--save_strategy", "no"]
    words = [sys.executable, "train_gkd.py", *command(saved, work / "rows.json", tmp_path / "run", *more)]
    master, slave = pty.openpty()

    def own_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(words, cwd=REPO, stdin=slave, stdout=slave, stderr=slave, preexec_fn=own_terminal)
    os.close(slave)
    said = b""
    while b"'loss'" not in said:
        said += os.read(master, 4096)
    os.close(master)
    finish(process)
    assert process.returncode == 0
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert damage(checkpoint) is None


def test_nohup_stays():
    code = (
        "import os, signal\nfrom gkd.training.faults import StopOnSignal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with StopOnSignal() as stop:\n    os.kill(os.getpid(), signal.SIGHUP)\n    print(stop.number)"
    )
    done = run_command([sys.executable, "-c", code], cwd=REPO)
    assert done.stdout == "None\n"
