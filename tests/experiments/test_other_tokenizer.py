"""experiments/other_tokenizer.py: the student that it makes."""

import json
import sys

import torch
from crossed import byte_level
from tiny import REPO, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(REPO))
from experiments import other_tokenizer


def test_the_student_has_the_teachers_weights_and_means_of_its_embeddings(tmp_path, monkeypatch):
    theirs = byte_level(400)
    teacher = make_model(0, vocab_size=len(theirs))
    teacher.save_pretrained(tmp_path / "teacher")
    theirs.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(sys, "argv", ["other_tokenizer.py", str(tmp_path / "teacher"), str(tmp_path / "out")])
    other_tokenizer.main()
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out/student")
    ours = AutoTokenizer.from_pretrained(tmp_path / "out/student")
    assert ours.get_vocab() != theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    rows, before = (m.get_input_embeddings().weight.detach() for m in (student, teacher))
    assert rows.isfinite().all()
    assert len(rows) == len(ours)
    token = ours.convert_tokens_to_ids("Ġarithmetic")  # a word of the prompts
    pieces = theirs(" arithmetic", add_special_tokens=False)["input_ids"]
    assert len(pieces) > 1
    torch.testing.assert_close(rows[token], before[pieces].mean(0))
    same = ours.eos_token_id, theirs.eos_token_id
    torch.testing.assert_close(rows[same[0]], before[same[1]])
    assert student.config.eos_token_id == ours.eos_token_id
    assert len(json.loads((tmp_path / "out/held_out.json").read_text())) == other_tokenizer.HELD_OUT
