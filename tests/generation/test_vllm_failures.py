"""What goes wrong with vLLM, as commands tell it: one line with what to do, and what was done is kept."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from commands import command
from progress import run
from tiny import REPO, ROWS, make_model
from vllm_engines import SHAPE, needs_vllm, save_models

import eval_gkd
import train_gkd

pytest_plugins = ["vllm_engines"]  # its fixtures
pytestmark = pytest.mark.usefixtures("groups_stay")
ON_VLLM = ("--generation_backend", "vllm", "--lmbda", "1", "--preflight", "off")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student and a teacher that vLLM has kernels for, and rows."""
    folder = tmp_path_factory.mktemp("models")
    save_models(folder, student=make_model(0, **SHAPE), teacher=make_model(1, **SHAPE))
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return folder


def train(folder, out, *flags):
    """The line with which the command ends; None where it goes through."""
    try:
        train_gkd.main(command(folder, folder / "rows.json", out, *ON_VLLM, *flags))
    except SystemExit as error:
        return error.code
    return None


def test_an_engine_that_does_not_start(stand_in, folder, tmp_path):
    said = train(folder, tmp_path / "run", "--vllm_memory", "0.95")
    assert said.startswith(
        "train_gkd.py: vLLM did not start for LlamaForCausalLM: Free memory on device is less. --vllm_memory"
    )
    assert said.endswith("--generation_backend auto does without vLLM.")
    assert "\n" not in said
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_another_version(stand_in, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gkd.config.generation.version", lambda name: "0.21.9")
    train(folder, tmp_path / "run")
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith(
        "--generation_backend vllm works with vLLM >=0.22,<0.32, not 0.21.9: pip install -e '.[vllm]'."
    )
    assert not stand_in.made


def test_an_engine_that_breaks_while_it_trains(stand_in, folder, tmp_path):
    """After two steps; the first text is written before training."""
    stand_in.breaks_after = 4
    said = train(folder, tmp_path / "run", "--max_steps", "4")
    assert said.startswith(
        "train_gkd.py: vLLM failed while LlamaForCausalLM wrote: RuntimeError: EngineCore encountered"
    )
    assert said.endswith("checkpoint-2 is whole: go on with it by --resume_from_checkpoint auto.")
    assert "\n" not in said
    stand_in.breaks_after = None
    assert train(folder, tmp_path / "run", "--max_steps", "4", "--resume_from_checkpoint", "auto") is None
    assert (tmp_path / "run/report.html").is_file()


def test_an_engine_that_breaks_while_it_evaluates(stand_in, folder, tmp_path):
    words = [
        "--models",
        folder / "student",
        "--teacher_model_name_or_path",
        folder / "teacher",
        "--generation_backend",
        "vllm",
    ]
    words += ["--dataset_name", folder / "rows.json", "--output_dir", tmp_path, "--max_new_tokens", 8]
    stand_in.breaks_after = 2
    with pytest.raises(SystemExit, match="vLLM failed while LlamaForCausalLM wrote: RuntimeError: EngineCore"):
        eval_gkd.main(list(map(str, words)))
    stand_in.breaks_after = None
    eval_gkd.main(list(map(str, words)))
    assert (tmp_path / "report.html").is_file()


@needs_vllm
def test_a_real_engine_that_does_not_start(folder, tmp_path):
    """For its cache there is not so much memory."""
    words = command(folder, folder / "rows.json", tmp_path / "run", *ON_VLLM)
    script = [sys.executable, str(REPO / "train_gkd.py"), *words]
    done = subprocess.run(
        script, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "100000"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("train_gkd.py: vLLM did not start for LlamaForCausalLM: ")
    assert said.endswith("--generation_backend auto does without vLLM.")
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@needs_vllm
def test_a_process_of_an_engine_that_is_killed(folder, tmp_path):
    """One of two that share the teacher; the caching ends with one line, and the same command goes on."""
    (tmp_path / "rows.json").write_text(json.dumps([row for _ in range(25) for row in ROWS]))
    words = ["--model_name_or_path", folder / "student", "--teacher_model_name_or_path", folder / "teacher"]
    words += ["--dataset_name", tmp_path / "rows.json", "--output_dir", tmp_path / "cache", "--rows_per_shard", 8]
    words += ["--seq_kd", "--max_new_tokens", 32, "--backend", "vllm", "--tensor_parallel_size", 2]
    script = [sys.executable, str(REPO / "cache_teacher.py"), *map(str, words)]
    process = subprocess.Popen(
        script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        shards = tmp_path / "cache/shards"
        until = time.monotonic() + 200
        while not list(shards.glob("*.json")) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        workers = [child for child in psutil.Process(process.pid).children() if "Worker" in child.name()]
        assert len(workers) == 2, [child.name() for child in psutil.Process(process.pid).children()]
        workers[1].kill()
        _, said = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    told = [line for line in said.splitlines() if line.startswith("cache_teacher.py: ")]
    assert len(told) == 1
    assert told[0].startswith("cache_teacher.py: vLLM broke: one of its processes has ended. ")
    assert "the same command goes on" in told[0]
    assert not psutil.pid_exists(workers[0].pid) or workers[0].status() == psutil.STATUS_ZOMBIE
    done = run(script)
    assert done.returncode == 0, done.stderr[-3000:]
