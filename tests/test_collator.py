"""Rows to tokens: what is scored, what is cut, what is refused."""

import pytest
from tiny import TEMPLATE, make_tokenizer

from gkd.collator import IGNORE, GKDCollator, RowEncoder
from gkd.rows import DataError


def encoder(tokenizer, **options):
    defaults = {"max_length": 200, "max_new_tokens": 20, "train_on": "last_turn", "stop_ids": [1, 2]}
    return RowEncoder(tokenizer, **(defaults | options))


def chat(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": c} for role, c in zip(roles, contents, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def scored(tokenizer, encoded):
    return tokenizer.decode([i for i in encoded["labels"] if i != IGNORE])


def test_last_turn_only_and_stop_token_last(tokenizer):
    encoded = encoder(tokenizer)({"messages": chat("a?", "first", "b?", "second")})
    assert scored(tokenizer, encoded) == "second<|end|>"  # the line feed behind <|end|> is not scored
    assert tokenizer.decode(encoded["prompt_ids"]).endswith("<|assistant|>")
    assert encoded["input_ids"][: len(encoded["prompt_ids"])] == encoded["prompt_ids"]


def test_all_turns(tokenizer):
    row = {"messages": chat("a?", "first", "b?", "second")}
    encoded = encoder(tokenizer, train_on="all_turns")(row)
    assert scored(tokenizer, encoded) == "first<|end|>second<|end|>"
    assert encoded["input_ids"] == encoder(tokenizer)(row)["input_ids"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat("hello?", "")},
        {"messages": chat("hello?")},
        {"messages": chat("hello?", "  "), "prompt": chat("hello?")},
        {"prompt": chat("hello?")},
        {"messages": chat("hello?", ""), "prompt": "<|user|>hello?<|end|>\n<|assistant|>"},
    ],
)
def test_no_answer(tokenizer, row):
    encoded = encoder(tokenizer)(row)
    assert scored(tokenizer, encoded) == ""
    assert tokenizer.decode(encoded["prompt_ids"]) == "<|user|>hello?<|end|>\n<|assistant|>"


def test_prompt_completion_text_and_messages(tokenizer):
    text = encoder(tokenizer)({"prompt": "2+2=", "completion": "4"})
    assert tokenizer.decode(text["prompt_ids"]) == "2+2="
    assert scored(tokenizer, text) == "4<|end|>"
    messages = encoder(tokenizer)({"prompt": chat("2+2?"), "completion": [{"role": "assistant", "content": "4"}]})
    assert messages["input_ids"] == encoder(tokenizer)({"messages": chat("2+2?", "4")})["input_ids"]


def test_truncation_keeps_system_prompt_and_answer(tokenizer):
    row = {"messages": chat("x" * 300 + "the end?", "yes", system="be kind")}
    encoded = encoder(tokenizer, max_length=100)(row)
    text = tokenizer.decode(encoded["prompt_ids"])
    assert len(encoded["prompt_ids"]) == 80
    assert text.startswith("<|system|>be kind<|end|>\n<|user|>x")
    assert text.endswith("the end?<|end|>\n<|assistant|>")
    assert scored(tokenizer, encoded) == "yes<|end|>"
    assert encoded["prompt_cut"]


def test_long_answer_is_cut_and_counted(tokenizer):
    encoded = encoder(tokenizer, max_length=60)({"messages": chat("hi?", "y" * 300)})
    assert len(encoded["input_ids"]) == 60
    assert encoded["answer_cut"]


def test_template_that_moves_tokens_is_refused():
    thinking = make_tokenizer(TEMPLATE.replace("<|assistant|>{%", "<|assistant|><think></think>{%"))
    with pytest.raises(DataError, match=r"row 3: .*not the beginning.*<think>.*--chat_template_kwargs"):
        encoder(thinking)({"messages": chat("hi?", "yes")}, 3)


def test_chat_template_kwargs_and_tools_reach_the_template():
    template = "{% if tools %}tools:{{ tools | length }} {% endif %}{% if loud %}LOUD {% endif %}" + TEMPLATE
    tool = {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
    tokenizer = make_tokenizer(template)
    encoded = encoder(tokenizer, chat_template_kwargs={"loud": True})(
        {"messages": chat("hi?", "yes"), "tools": [tool]}
    )
    assert tokenizer.decode(encoded["input_ids"]).startswith("tools:1 LOUD <|user|>")


def test_contradicting_prompt_is_refused(tokenizer):
    with pytest.raises(DataError, match="`prompt` is not what the template makes"):
        encoder(tokenizer)({"messages": chat("hi?", "yes"), "prompt": chat("bye?")})


def test_collator_pads(tokenizer):
    encode = encoder(tokenizer)
    batch = GKDCollator(0)([encode({"messages": chat("hi?", "yes")}), encode({"messages": chat("hello there?", "")})])
    assert batch["prompts"].shape == batch["prompt_attention_mask"].shape
    assert batch["prompt_attention_mask"][0, 0] == 0  # left
    assert batch["attention_mask"][:, 0].tolist() == [1, 1]  # right
    assert (batch["labels"][1] == IGNORE).all()
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != IGNORE]) == "yes<|end|>"


def test_a_long_prompt_keeps_what_the_template_writes_first():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "<|system|>rules<|end|>" + tokenizer.chat_template
    encoder = RowEncoder(tokenizer, 60, 8, "last_turn", [1, 2])
    encoded = encoder({"prompt": [{"role": "user", "content": "q" * 200}]})
    text = tokenizer.decode(encoded["prompt_ids"])
    assert text.startswith("<|system|>rules<|end|><|user|>qq")
    assert len(encoded["prompt_ids"]) == 52
