"""The wheel as somebody installs it: the command trains from any folder, launched or not, and runs no code of that folder."""

import json
import os
import shutil
import site
import subprocess
import sys

import pytest
from tiny import REPO, ROWS

FLAGS = """--dataset_name rows.json --lmbda 0.5 --max_length 64 --max_new_tokens 4 --preflight off
--per_device_train_batch_size 2 --bf16 False --use_cpu --report_to none --save_steps 1""".split()


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory):
    """Of an environment with the wheel installed; it shares the libraries of this one, but not this gkd."""
    home = tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "setup.py", "README.md"):
        (home / "source").mkdir(exist_ok=True)
        shutil.copy(REPO / name, home / "source")
    for name in ("gkd", "ds_configs"):
        shutil.copytree(REPO / name, home / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    environment = {**os.environ, "PYTHONPATH": "", "PIP_NO_INDEX": "1"}

    def run(*words):
        subprocess.run(words, check=True, cwd=home, env=environment)

    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", home, home / "source")
    run(sys.executable, "-m", "venv", "--without-pip", home / "venv")
    (wheel,) = home.glob("gkd-*.whl")
    run(*pip, "--python", home / "venv/bin/python", "install", "--no-deps", wheel)
    (libraries,) = (home / "venv/lib").glob("python*/site-packages")
    (libraries / "shared.pth").write_text("\n".join(site.getsitepackages()))
    return home / "venv/bin"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with rows, and with modules that somebody has sent."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    for name in ("torch", "transformers", "rich", "yaml"):
        (folder / f"{name}.py").write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\n")
    return folder


def gkd(bin_folder, work, *words):
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": "", "NO_COLOR": "1"}
    done = subprocess.run(["gkd", *map(str, words)], cwd=work, env=environment, capture_output=True, text=True)
    assert not (work / "ran").exists()
    return done


@pytest.fixture(scope="module")
def train(saved, bin_folder, work):
    """The command with these words more; all else is the same for each test."""
    models = ["--model_name_or_path", saved / "student", "--teacher_model_name_or_path", saved / "teacher"]
    return lambda *words: gkd(bin_folder, work, "train", *models, *FLAGS, "--output_dir", "run", *words)


def test_it_trains(train, work):
    done = train("--max_steps", "1")
    assert done.returncode == 0, done.stderr
    assert "Report: run/report.html" in done.stdout
    assert (work / "run/model.safetensors").is_file()


def test_a_launcher_starts_it_and_resumes(train, work):
    launch = ["--accelerate_config", "cpu", "--num_processes", "1"]
    done = train(*launch, "--max_steps", "2", "--resume_from_checkpoint", "auto")
    assert done.returncode == 0, done.stderr
    assert (work / "run/checkpoint-2").is_dir()


def test_it_answers_from_any_folder(bin_folder, work):
    done = gkd(bin_folder, work, "trian")
    assert done.stderr == "gkd: error: unknown command trian. Did you mean train?\n"
    done = gkd(bin_folder, work, "report", ".")
    assert done.stderr.startswith("gkd report: ")
    assert "so there is nothing to report" in done.stderr
