"""The wheel as somebody installs it: the command trains from any folder, launched or not, and runs no code of that folder."""

import json
import os
import re
import shutil
import site
import subprocess
import sys

import pytest
from conftest import REPO, ROWS

FLAGS = """--dataset_name rows.json --lmbda 0.5 --max_steps 1 --max_length 64 --max_new_tokens 4 --preflight off
--per_device_train_batch_size 2 --bf16 False --use_cpu --report_to none --save_strategy no""".split()


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


@pytest.fixture
def work(tmp_path):
    """A folder with rows, and with modules that somebody has sent."""
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    for name in ("torch", "transformers", "rich", "yaml"):
        (tmp_path / f"{name}.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    return tmp_path


def gkd(bin_folder, work, *words):
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": "", "NO_COLOR": "1"}
    done = subprocess.run(["gkd", *map(str, words)], cwd=work, env=environment, capture_output=True, text=True)
    assert not (work / "ran").exists()
    return done


@pytest.mark.parametrize(
    "launch", [[], ["--accelerate_config", "cpu", "--num_processes", "1"]], ids=["alone", "launched"]
)
def test_it_trains_and_says_how_to_go_on(saved, bin_folder, work, launch):
    models = ["--model_name_or_path", saved / "student", "--teacher_model_name_or_path", saved / "teacher"]
    # A run of one step that is resumed with other rows is refused with a command for a new one, as it was typed.
    words = ["train", *launch, *models, *FLAGS, "--output_dir", "run", "--save_strategy", "steps", "--save_steps", "1"]
    done = gkd(bin_folder, work, *words)
    assert done.returncode == 0, done.stderr
    assert "Report: run/report.html" in done.stdout
    assert (work / "run/model.safetensors").is_file()
    if launch:
        done = gkd(bin_folder, work, *words, "--seed", "7", "--resume_from_checkpoint", "auto")
        assert done.returncode != 0
        typed = " ".join(map(str, words)).replace("--output_dir run ", "")
        assert re.search(re.escape(f"gkd {typed} --seed 7 --output_dir run-from-1 "), done.stderr), done.stderr


def test_it_answers_from_any_folder(bin_folder, work):
    done = gkd(bin_folder, work, "trian")
    assert done.stderr == "gkd: error: unknown command trian. Did you mean train?\n"
    done = gkd(bin_folder, work, "report", ".")
    assert done.stderr.startswith("gkd report: ")
    assert "so there is nothing to report" in done.stderr
