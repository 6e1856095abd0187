"""experiments/translate_zh_en.sh from pairs to an exported student, and what it does when started again."""

import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from progress import run as run_command
from tiny import REPO
from transformers import AutoModelForCausalLM, AutoTokenizer

from gkd.data.loading import load_rows
from gkd.runs.results import read_results

SCRIPT = REPO / "experiments/translate_zh_en.sh"
FAST = ["--bf16", "False", "--max_steps", "1", "--max_new_tokens", "8", "--report_to", "none"]


def start(out, path, *flags, **variables):
    """The script, with the programs of the folder `path` before all others."""
    environment = os.environ | {"OUT": str(out), "PATH": f"{path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {name: str(value) for name, value in variables.items()}
    return run_command([SCRIPT, *flags], env=environment)


def programs(folder, **bodies):
    """Shell scripts that stand for programs, in a folder."""
    folder.mkdir()
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def test_translation_end_to_end(saved, tmp_path):
    out, here = tmp_path / "out", Path(sys.executable).parent
    places = {"STUDENT": saved / "student", "TEACHER": saved / "teacher", "CONFIG": "ds_configs/cpu.yaml"}
    places["TUNE_FLAGS"] = "--bf16 False --max_steps 1 --warmup_steps 0"
    (out / "teacher.partial/checkpoint-1").mkdir(parents=True)  # of a tuning that was killed while it saved
    done = start(out, here, *FAST, **places)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (out / "teacher/model.safetensors").exists()

    held, rows = (list(load_rows(str(out / name), "train")) for name in ("held_out.jsonl", "rows/train.jsonl"))
    pairs = [json.loads(line) for line in (REPO / "data/sample_zh_en.jsonl").open(encoding="utf-8")]
    found = {row["prompt"][-1]["content"]: row["completion"][0]["content"] for row in held + rows}
    assert found == {pair["zh"]: pair["en"] for pair in pairs}
    assert len(held) + len(rows) == len(pairs)
    assert [path.name for path in (out / "rows").iterdir()] == ["train.jsonl"]  # or TRL trains on held-out rows
    assert all(row["prompt"][0] == {"role": "system", "content": "帮我把下面中文翻译成英文"} for row in held + rows)

    record = json.loads((out / "run/run.json").read_text(encoding="utf-8"))
    assert record["arguments"]["teacher_adapter"] == str(out / "teacher")
    results = {result["model"]: result["metrics"] for result in read_results(out / "run")}
    assert set(results) == {"before", "after", "teacher"}
    assert all({"score/bleu", "score/chrf"} <= metrics.keys() for metrics in results.values())
    assert "| | before | after | teacher |\n| bleu |" in done.stdout

    ids = AutoTokenizer.from_pretrained(out / "student")("早", return_tensors="pt")["input_ids"]
    exported, before = (AutoModelForCausalLM.from_pretrained(path) for path in (out / "student", saved / "student"))
    assert not torch.equal(exported(ids).logits, before(ids).logits)

    # Started again it only shows what it has: neither program is called.
    none = programs(tmp_path / "none", python="exit 1", accelerate="exit 1")
    again = start(out, none, *FAST, **places)
    assert again.returncode == 0, again.stderr
    assert all(line in done.stdout.splitlines() for line in again.stdout.splitlines())
    assert "| bleu |" in again.stdout


@pytest.mark.parametrize("tuned", ["adapter", "model"])
def test_translation_with_a_tuned_teacher_and_a_stop(tmp_path, tuned):
    """No teacher is tuned where one is given; a training that a signal has stopped is not exported."""
    out, teacher = tmp_path / "out", tmp_path / "tuned"
    (out / "rows").mkdir(parents=True)
    (out / "held_out.jsonl").touch()
    teacher.mkdir()
    if tuned == "adapter":
        (teacher / "adapter_config.json").touch()
    stopped = programs(tmp_path / "stopped", python="exit 1", accelerate='printf "%s\\n" "$@"')  # 0, and no report
    done = start(out, stopped, "--seed", "1", TEACHER="base", TEACHER_TUNED=teacher)
    assert done.returncode == 0, done.stderr
    *words, last = done.stdout.splitlines()
    assert last == "The training was stopped; the same command goes on with it."
    assert "trl.scripts.sft" not in words
    assert words[-2:] == ["--seed", "1"]
    flags = dict(itertools.pairwise(words))
    assert flags["--teacher_model_name_or_path"] == ("base" if tuned == "adapter" else str(teacher))
    assert flags.get("--teacher_adapter") == (str(teacher) if tuned == "adapter" else None)
