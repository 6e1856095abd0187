"""What a run shows before weights load."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from chat_models import trl_template
from rich.console import Console
from tiny import REPO, make_tokenizer

import train_gkd
from gkd.data.encoding import RowEncoder
from gkd.training.memory import GIB, Estimate
from gkd.training.preflight import rendered


def test_scored_tokens_stand_in_brackets():
    encoder = RowEncoder(make_tokenizer(), 200, 8, "last_turn", [1, 2])
    row = encoder({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]})
    text = rendered(row, encoder.tokenizer).plain
    prompt, answer = text.split("⟦")
    assert "hi" in prompt
    assert "yes" not in prompt
    assert answer.startswith("yes")
    empty = encoder({"prompt": [{"role": "user", "content": "hi"}]})
    assert "no answer: a model writes it" in rendered(empty, encoder.tokenizer).plain


def test_only_shows_and_loads_no_weights(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gkd.models.loading.load_student", lambda *a: pytest.fail("weights were loaded"))
    monkeypatch.setattr(
        "gkd.training.preflight.Console", lambda **k: Console(file=sys.stdout, width=120)
    )  # the test's own terminal
    flags = ["--model_name_or_path", saved / "student", "--teacher_model_name_or_path", saved / "teacher"]
    flags += ["--dataset_name", REPO / "data/sample_answers.json", "--output_dir", tmp_path / "run"]
    train_gkd.main([*map(str, flags), "--preflight", "only", "--max_length", "150", "--report_to", "none"])
    shown = capsys.readouterr().out
    for text in ("⟦", "Tokens of 4 rows", "an answer ends with", "the same for student and teacher", "peak"):
        assert text in shown
    assert not (tmp_path / "run").exists()


def test_system_as_user_and_a_template_that_closes_nothing(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gkd.training.preflight.Console", lambda **k: Console(file=sys.stdout, width=400))
    data, template = tmp_path / "rows.json", tmp_path / "template.jinja"
    asked = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    data.write_text(
        json.dumps([{"messages": [{"role": "system", "content": "be kind"}, *asked]}, {"messages": asked}])
    )
    template.write_text(trl_template("gemma").replace("<end_of_turn>", ""))
    flags = ["--model_name_or_path", saved / "student", "--teacher_model_name_or_path", saved / "teacher"]
    flags += ["--dataset_name", data, "--output_dir", tmp_path / "run", "--chat_template_path", template]
    flags = [*map(str, flags), "--preflight", "only", "--max_new_tokens", "20", "--report_to", "none"]
    with pytest.raises(SystemExit, match=r"train_gkd.py: .*rows.json, row 0: .*: System role not supported. It passes with --system_as_user\.$"):  # fmt: skip
        train_gkd.main(flags)
    train_gkd.main([*flags, "--system_as_user"])
    shown = capsys.readouterr().out
    assert "<start_of_turn>user\nbe kind\n\nhi\n<start_of_turn>model\n⟦yes" in shown
    assert "warning: the chat template closes no answer" in shown


def test_the_line_about_vllm_stands_below_the_memory(saved, tmp_path, capsys, monkeypatch):
    """Where there is a GPU, whose memory decides."""
    monkeypatch.setattr("gkd.training.preflight.Console", lambda **k: Console(file=sys.stdout, width=120))
    monkeypatch.setattr(Estimate, "vllm_advice", lambda self: f"for {self.device_memory / GIB:.0f} GiB")
    flags = ["--model_name_or_path", saved / "student", "--teacher_model_name_or_path", saved / "teacher"]
    flags += ["--dataset_name", REPO / "data/sample_answers.json", "--output_dir", tmp_path / "run"]
    flags = [*map(str, flags), "--preflight", "only", "--max_length", "150", "--report_to", "none", "--lmbda", "1"]
    train_gkd.main(flags)
    assert "for 80 GiB" not in capsys.readouterr().out
    properties = SimpleNamespace(total_memory=24 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    train_gkd.main(flags)
    assert "for 24 GiB" in capsys.readouterr().out


def test_the_estimate_of_a_run_has_no_advice_where_all_rows_fit(saved, tmp_path, capsys, monkeypatch):
    found = []
    monkeypatch.setattr("gkd.training.preflight._memory_table", lambda estimate, gpus: found.append(estimate) or "")
    flags = ["--model_name_or_path", saved / "student", "--teacher_model_name_or_path", saved / "teacher"]
    flags += ["--dataset_name", REPO / "data/sample_answers.json", "--output_dir", tmp_path / "run", "--lmbda", "1"]
    train_gkd.main([*map(str, flags), "--preflight", "only", "--max_length", "150", "--report_to", "none"])
    (estimate,) = found
    assert estimate.decoding.fit > estimate.decoding.rows
    assert estimate.vllm_advice() is None
