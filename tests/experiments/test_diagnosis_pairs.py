"""experiments/diagnosis_pairs.sh: its tokenizer, its models, and its table."""

import itertools
import json
import sys

import pytest
from tiny import REPO
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(REPO))
from experiments.claim import packing, small


@pytest.mark.parametrize("make", packing.MAKERS.values(), ids=packing.MAKERS)
def test_no_word_of_the_task_is_unknown(make):
    tokenizer = small.tokenizer()
    for row in itertools.islice(packing.rows_of(make, 4, 3, "test"), 50):
        text = row.question + row.answer
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.pad_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_models_load_with_their_template(tmp_path):
    small.save(tmp_path, 2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.num_hidden_layers == 2
    chat = [{"role": "user", "content": "order"}, {"role": "assistant", "content": "done"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<user>order<assistant>done<end>"
    assert (
        tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) == "<user>order<assistant>"
    )


def test_a_line_of_the_table(tmp_path):
    pair = tmp_path / "pairs/moves-500"
    for kind, solved in (("sampled", (0.9, 0.5, 0.55, 0.7)), ("greedy", (1.0, 0.6, 0.6, 0.9))):
        names = zip(("teacher", "student", "supervised", "mixed"), solved, strict=True)
        results = [{"model": name, "metrics": {"score/solved": {"value": value}}} for name, value in names]
        folder = pair / "measured" / kind / "evaluation"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"results": results}))
    found = {
        "rescue": {"rate": 0.8},
        "student": {"figures": {"on_policy/loss": {"value": 0.1}}},
    }
    (pair / "diagnosis").mkdir()
    (pair / "diagnosis/diagnosis.json").write_text(json.dumps(found))
    line = small.table(tmp_path).splitlines()[-1]
    assert line == "| moves, 500 | 90% 100% | 50% 60% | 80% | 90% | +5.0 +0.0 | +20.0 +30.0 |"
