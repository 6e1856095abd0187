"""The quickstart, restarted after each point where it may end. Its teacher is tiny, so nothing is downloaded."""

import json
import os
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from tiny import REPO, SPECIALS, TEMPLATE, make_model, make_tokenizer

import gkd.cli.shrink
import train_gkd
from experiments import quickstart, self_prompts

FAST = ["--use_cpu", "--bf16", "False", "--max_new_tokens", "4", "--max_steps", "1"]


# The commands are those of a real machine; what is there to train on and how long is small, and the CPU trains.
CPU = replace(quickstart.CPU, held_out_rows=2)
GPU = replace(quickstart.GPU, cut=("--layers", "2"), own_prompts=20, held_out_rows=2, launcher="cpu.yaml")


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Starts the quickstart in `tmp_path/out`, where the teacher is; returns what it had to do."""
    out, called = tmp_path / "out", []
    make_model(1, num_hidden_layers=4).save_pretrained(out / "teacher")
    make_tokenizer().save_pretrained(out / "teacher")

    def call(*words):
        """Runs the same commands in this process, so that libraries load once."""
        words = [str(word) for word in words]
        if "shrink" in words:
            called.append("student")
            monkeypatch.setattr(sys, "argv", words[3:])
            gkd.cli.shrink.main()
        elif words[1] == str(REPO / "experiments/self_prompts.py"):
            called.append("prompts")
            self_prompts.main(words[2:])
        else:
            called.append(words[words.index("--output_dir") + 1].rpartition("/")[2])
            train_gkd.main([*words[words.index(str(REPO / "train_gkd.py")) + 1 :], *FAST])

    monkeypatch.setattr(quickstart, "call", call)

    def start(*flags: str) -> list[str]:
        called.clear()
        quickstart.main([str(out), *flags], (CPU, GPU))
        assert "Held-out forward KL" in capsys.readouterr().out
        return called

    return start


def test_started_again_it_goes_on_where_it_was(start, tmp_path):
    out = tmp_path / "out"
    assert start() == ["student", "warm_up", "distilled"]
    assert start() == []
    (out / "distilled/report.html").unlink()  # killed in its last evaluation
    assert start() == ["distilled"]
    (out / "warm_up/report.html").unlink()  # killed before anything was saved
    (out / "warm_up/model.safetensors").unlink()
    (out / "warm_up/trainer_state.json").unlink()
    shutil.rmtree(out / "student")
    assert start() == ["student", "warm_up"]


def test_on_a_gpu_the_teacher_writes_prompts_too(start, tmp_path):
    out = tmp_path / "out"
    assert start("--gpu") == ["student", "prompts", "warm_up", "distilled"]
    rows = [json.loads(line) for line in (out / "prompts.jsonl").open(encoding="utf-8")]
    given = json.loads(quickstart.TRAIN.read_text(encoding="utf-8"))
    assert rows[: len(given)] == given
    assert len(rows) == len(given) + 20
    for name, lmbda in (("warm_up", 0.0), ("distilled", 0.5)):
        flags = json.loads((out / name / "run.json").read_text())["arguments"]
        assert (flags["dataset_name"], flags["lmbda"]) == (str(out / "prompts.jsonl"), lmbda)
        assert json.loads((out / name / "config.json").read_text())["num_hidden_layers"] == 2
    assert start("--gpu") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpus_plan_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"--gpu: torch sees no GPU\. .*quickstart_cpu\.sh\.$"):
        quickstart.main(["--gpu"])
    assert list(tmp_path.iterdir()) == []


def test_prompts_are_whole_turns_each_once_and_the_same_again(tmp_path):
    tokenizer = make_tokenizer()
    make_model(1).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")

    def write(name: str, *flags: str) -> list[str]:
        self_prompts.main([str(tmp_path / "teacher"), "-o", str(tmp_path / name), "-n", "30", *flags])
        return [json.loads(line)["prompt"][0]["content"] for line in (tmp_path / name).open(encoding="utf-8")]

    texts = write("a.jsonl")
    assert len(set(texts)) == len(texts) == 30
    assert not any(special in text for special in SPECIALS for text in texts)
    (tmp_path / "held_out.json").write_text(json.dumps([{"prompt": texts[3]}]))
    others = write("b.jsonl", "--held_out", str(tmp_path / "held_out.json"))
    assert others[:-1] == texts[:3] + texts[4:]
    assert write("c.jsonl", "--seed", "1") != texts


def test_a_turn_is_opened_as_the_template_opens_it_a_default_system_prompt_included():
    system = "{% if messages[0].role != 'system' %}<|system|>Be kind.<|end|>{% endif %}"
    tokenizer = make_tokenizer(system + TEMPLATE)
    assert tokenizer.decode(self_prompts.opened_turn(tokenizer)) == "<|system|>Be kind.<|end|><|user|>"
    for template, problem in ((None, "no chat template"), ("{{ messages[0].content }}", "opens no turn")):
        with pytest.raises(ValueError, match=problem):
            self_prompts.opened_turn(make_tokenizer(template))


def test_a_model_that_writes_the_same_again_and_again_is_refused(tmp_path):
    make_model(1).save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    out = tmp_path / "prompts.jsonl"
    with pytest.raises(SystemExit, match="wrote 64 turns of a user, and [01] of them .* take another chat model"):
        self_prompts.main([str(tmp_path / "teacher"), "-o", str(out), "-n", "30", "--temperature", "1e-4"])
    assert not out.exists()


def test_ctrl_c_reaches_the_training_behind_its_launcher_and_waits_for_it(tmp_path):
    training = (
        "import os, pathlib, signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.5)\n    pathlib.Path('saved').touch()\n    sys.exit()\n"
        f"os.chdir({str(tmp_path)!r})\nsignal.signal(signal.SIGTERM, save)\n"
        f"os.kill({os.getpid()}, signal.SIGINT)\ntime.sleep(60)"
    )
    launcher = f"import subprocess, sys\nsys.exit(subprocess.call([sys.executable, '-c', {training!r}]))"
    with pytest.raises(KeyboardInterrupt):
        quickstart.call(sys.executable, "-c", launcher)
    assert (tmp_path / "saved").is_file()


def test_help_is_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        quickstart.main(["--help"])
    assert stop.value.code == 0
    assert "goes on where it was" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
