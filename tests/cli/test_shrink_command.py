"""`gkd shrink`: the table of what each number of layers costs, and the student."""

import json
import re
from contextlib import nullcontext

import pytest
import torch
from families import make_family
from tiny import ROWS, make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from gkd.cli.shrink import check_written, main
from gkd.models.shrink import shrink


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Six layers, of which two do nothing."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    model = make_model(0, num_hidden_layers=6).to(torch.bfloat16)
    with torch.no_grad():
        for i in (1, 3):
            model.model.layers[i].self_attn.o_proj.weight.zero_()
            model.model.layers[i].mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_without_a_number_it_shows_what_each_costs(teacher, capsys):
    main([str(teacher)])
    said = capsys.readouterr()
    rows = re.findall(
        r"│ +(\d) │ +(\d+)% │ +([\d.]+) │ +([\w ]+?) +│ +([\d, ]+?) +│ +([\d.]+) │ +([\d.]+) │", said.out
    )
    assert [(row[0], row[2], row[4]) for row in rows] in (
        [("5", "0.000", "1"), ("4", "0.000", "1, 3")],
        [("5", "0.000", "3"), ("4", "0.000", "1, 3")],
    )
    shares = [int(row[1]) for row in rows]
    assert 100 > shares[0] > shares[1] > 50
    assert 1 > float(rows[0][5]) > float(rows[1][5]) > 0  # widths of as many parameters
    assert float(rows[0][6]) > 0.001
    assert "one by one, 4 of 6 layers" in said.err


def test_a_student_of_the_layers_that_count(teacher, tmp_path, capsys):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    main([str(teacher), "-o", str(tmp_path / "out"), "--layers", "4", "--prompts", str(tmp_path / "rows.json")])
    model, student = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (teacher, tmp_path / "out"))
    assert (len(student.model.layers), student.dtype) == (4, torch.bfloat16)
    ids = torch.arange(4, 24)[None]
    assert torch.equal(student(ids).logits, model(ids).logits)
    assert "4 layers, " in capsys.readouterr().out


@pytest.mark.parametrize("layers", [None, 4])
def test_a_student_with_narrower_mlps(teacher, tmp_path, capsys, layers):
    """What is told is its divergence, on the text that it is chosen by."""
    words = [] if layers is None else ["--layers", str(layers)]
    main([str(teacher), "-o", str(tmp_path / "out"), "--width", "0.5", *words])
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (len(student.model.layers), student.config.intermediate_size) == (layers or 6, 32)
    assert student.model.layers[0].mlp.down_proj.weight.shape == (32, 32)
    said = capsys.readouterr().out
    nats = float(re.search(r"with 32 of 64 MLP channels: ([\d.]+) nats", said)[1])
    assert 0 < nats < 5
    assert f"{layers or 6} layers with 32 MLP channels, " in said


def test_a_width_of_a_teacher_without_such_mlps(tmp_path, monkeypatch):
    monkeypatch.setattr("gkd.cli.shrink.load_pretrained", lambda *_, **__: pytest.fail("loads"))
    make_family("gpt2").save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    with pytest.raises(SystemExit, match="GPT2LMHeadModel has no gated MLP of one size"):
        main([str(tmp_path / "teacher"), "-o", str(tmp_path / "out"), "--width", "0.5"])


def test_flags_that_need_each_other(teacher, tmp_path, capsys):
    for words, said in (
        (["--layers", "4"], "--layers needs -o DIR"),
        (["--width", "0.5"], "--width needs -o DIR"),
        (["-o", str(tmp_path / "out")], "-o needs --layers N or --width SHARE"),
        (["-o", str(tmp_path / "out"), "--width", "1.5"], "--width is a share above 0"),
        (["-o", str(tmp_path / "out"), "--width", "nan"], "--width is a share above 0"),
        (["-o", str(tmp_path), "--layers", "4"], "exists already"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(teacher), *words])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


def test_bad_prompts_are_refused_before_weights_load(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("gkd.cli.shrink.load_pretrained", lambda *_, **__: pytest.fail("loads"))
    (tmp_path / "rows.json").write_text(json.dumps([*ROWS, {"text": "?"}]))
    with pytest.raises(SystemExit, match="rows.json, row 4: neither `messages` nor `prompt`"):
        main([str(teacher), "--prompts", str(tmp_path / "rows.json")])


@torch.no_grad()
@pytest.mark.parametrize(("kept", "fits"), [((0, 1, 2), True), ((1, 2, 3), False)])
def test_a_student_whose_config_says_other_layers_is_refused(tmp_path, kept, fits):
    """Every second layer of this Jamba is attention, the first is not."""
    model = shrink(make_family("jamba", layers=4), kept)
    model.save_pretrained(tmp_path)
    with nullcontext() if fits else pytest.raises(ValueError, match="JambaForCausalLM: with 3 layers its config says"):
        check_written(model, str(tmp_path))
