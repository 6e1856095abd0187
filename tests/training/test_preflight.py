"""What a run shows before weights load, and its memory estimate beside peaks measured on an H100."""

import json
import sys

import pytest
from chat_models import trl_template
from conftest import REPO
from estimates import random_pair, settings, sizes
from rich.console import Console
from tiny import make_tokenizer
from transformers import LlamaConfig

import train_gkd
from gkd.data.encoding import RowEncoder
from gkd.training.memory import GIB, ModelSize, Shape, advice, estimate
from gkd.training.preflight import rendered


# Peaks of torch.cuda.max_memory_allocated on H100 80GB (torch 2.11, transformers 5.23), shapes of Llama 1B and 8B, LoRA
# of rank 8, gradient checkpointing: benchmarks/step_time.py, shapes seed (3 × 192 tokens) and long (4 × 1024).
@pytest.mark.parametrize(
    ("measured", "shape", "changes"),
    [
        (17.96, Shape(3, 192, 128), {"lmbda": 0.0, "seq_kd": False}),
        (18.73, Shape(4, 1024, 768), {"lmbda": 0.0, "seq_kd": False}),
        (19.40, Shape(3, 192, 128), {"lmbda": 1.0}),
        (20.56, Shape(3, 192, 128), {"lmbda": 0.5}),
    ],
    ids=["seed", "long", "seed, on-policy", "seed, mix"],
)
def test_estimate_is_near_the_measured_peak(measured, shape, changes):
    found = estimate(*sizes(), *settings(**changes), shape, 1)
    print(f"estimated {found.peak / GIB:.2f} GiB, measured {measured}")
    assert found.peak / GIB == pytest.approx(measured, rel=0.05)


def test_sizes_and_advice():
    student, teacher = sizes()
    assert student.parameters == 1_235_814_400  # as published for Llama-3.2-1B
    assert teacher.parameters == 8_030_261_248  # Llama-3.1-8B
    student_args, args = settings()
    found = estimate(student, teacher, student_args, args, Shape(3, 352, 128), 1)
    assert advice(found, student_args, args).startswith("--teacher_load_in_4bit")
    full = estimate(ModelSize.of(LlamaConfig(**random_pair.BASE, **random_pair.SHAPES["1b"])), teacher, student_args, args, Shape(3, 352, 128), 1)  # fmt: skip
    assert full.resident["gradients and optimizer"] == 3 * 4 * student.parameters
    cast = (student.linear + 128256 * 2048) * 2  # fp32 weights under bf16 autocast
    assert full.resident["student's weights cast for generation"] == cast
    assert "student's weights cast for generation" not in found.resident
    head = 128256 * 2048 * (4 + 4)
    assert full.phases["activations and divergence"] == found.phases["activations and divergence"] + head


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
