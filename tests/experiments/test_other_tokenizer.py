"""experiments/other_tokenizer.py: the student and the rows that it makes; and experiments/gold.py, which trains on them."""

import json
import sys

import pytest
import torch
from crossed import byte_level
from tiny import REPO, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(REPO))
from experiments import gold, other_tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of a tiny teacher, and of what is made of it."""
    folder = tmp_path_factory.mktemp("pair")
    theirs = byte_level(400)
    make_model(0, vocab_size=len(theirs), max_position_embeddings=1024).save_pretrained(folder / "teacher")
    theirs.save_pretrained(folder / "teacher")
    with pytest.MonkeyPatch.context() as patch:
        words = ["other_tokenizer.py", str(folder / "teacher"), str(folder / "out"), "--prompts", "40"]
        patch.setattr(sys, "argv", words)
        other_tokenizer.main()
    return folder


def test_the_student_has_the_teachers_weights_and_means_of_its_embeddings(pair):
    student, teacher = (AutoModelForCausalLM.from_pretrained(pair / name) for name in ("out/student", "teacher"))
    ours, theirs = (AutoTokenizer.from_pretrained(pair / name) for name in ("out/student", "teacher"))
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
    assert len(json.loads((pair / "out/held_out.json").read_text())) == other_tokenizer.HELD_OUT


def test_rows_are_the_prompts_with_the_answers_that_end(pair):
    prompts = [row["prompt"] for row in json.loads((REPO / "data/prompts_train.json").read_text())]
    rows = json.loads((pair / "out/train.json").read_text())
    assert 0 < len(rows) < 40
    assert all(row["prompt"] in prompts for row in rows)
    texts = [row["completion"][0]["content"] for row in rows]
    assert all(texts)
    assert not any(special in text for text in texts for special in ("<|end|>", "<|eos|>"))


def test_trls_trainer_learns_from_them(pair):
    words = [str(pair / name) for name in ("out/student", "teacher", "out/train.json", "gold")]
    flags = "--max_steps 1 --per_device_train_batch_size 2 --learning_rate 1e-2 --use_cpu True --disable_tqdm True"
    gold.main([*words, *flags.split()])
    before, after = (
        AutoModelForCausalLM.from_pretrained(pair / name).state_dict() for name in ("out/student", "gold")
    )
    assert max((after[name] - weight).abs().max() for name, weight in before.items()) > 1e-3
    log = json.loads((pair / "gold/trainer_state.json").read_text())["log_history"]
    assert log[-1]["train_runtime"] > 0
    with pytest.raises(SystemExit):
        gold.main(words[:3])
