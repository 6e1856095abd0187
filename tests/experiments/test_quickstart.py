"""The quickstart, restarted after each point where it may end. Its teacher is tiny, so nothing is downloaded."""

import os
import shutil
import sys

import pytest
from tiny import REPO, make_model, make_tokenizer

import gkd.cli.shrink
import train_gkd
from experiments import quickstart

FAST = ["--use_cpu", "--bf16", "False", "--max_new_tokens", "4", "--max_steps", "1"]


def test_started_again_it_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
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
        else:
            called.append(words[words.index("--output_dir") + 1].rpartition("/")[2])
            train_gkd.main([*words[words.index(str(REPO / "train_gkd.py")) + 1 :], *FAST])

    monkeypatch.setattr(quickstart, "call", call)
    monkeypatch.setattr(quickstart, "HELD_OUT_ROWS", 2)

    def start() -> list[str]:
        called.clear()
        quickstart.main([str(out)])
        assert "Held-out forward KL" in capsys.readouterr().out
        return called

    assert start() == ["student", "warm_up", "distilled"]
    assert start() == []
    (out / "distilled/report.html").unlink()  # killed in its last evaluation
    assert start() == ["distilled"]
    (out / "warm_up/report.html").unlink()  # killed before anything was saved
    (out / "warm_up/model.safetensors").unlink()
    (out / "warm_up/trainer_state.json").unlink()
    shutil.rmtree(out / "student")
    assert start() == ["student", "warm_up"]


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
