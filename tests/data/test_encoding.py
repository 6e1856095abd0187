"""Rows to tokens: what is scored, what is cut, what is refused."""

import pytest
from chat_models import CHAT_MODELS, CORES, ChatModel, tokenizer_of
from datasets.fingerprint import Hasher
from tiny import TEMPLATE, make_tokenizer
from tokenizers.processors import TemplateProcessing

import gkd.data.encoding
from gkd.cli.speakers import encode
from gkd.data.batch import IGNORE, GKDCollator
from gkd.data.encoding import RowEncoder, never_stops
from gkd.data.rows import DataError


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
    thinking = TEMPLATE.replace("<|assistant|>{%", "<|assistant|>{% if enable_thinking %}<think></think>{% endif %}{%")
    row = {"messages": chat("hi?", "yes")}
    on = {"enable_thinking": True}
    with pytest.raises(DataError, match=r"row 3: .*not the beginning.*<think>.*passes with --chat_template_kwargs '{\"enable_thinking\": false}'\.$"):  # fmt: skip
        encoder(make_tokenizer(thinking), chat_template_kwargs=on)(row, 3)
    fixed = make_tokenizer(TEMPLATE.replace("<|assistant|>{%", "<|assistant|><think></think>{%"))
    with pytest.raises(DataError, match=r"row 3: .*No other flag helps: give another --chat_template_path"):
        encoder(fixed)(row, 3)


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


@pytest.mark.parametrize("kind", CORES)
def test_text_goes_on_without_a_space_of_the_tokenizer(kind):
    tokenizer = tokenizer_of(CHAT_MODELS["llama-2"], kind)
    ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("7*7=", "7*7=7", "the answer is", "the answer is four")}  # fmt: skip
    encode = encoder(tokenizer, stop_ids=[tokenizer.eos_token_id])
    for prompt, completion in (("7*7=", "7"), ("the answer is", " four")):
        encoded = encode({"prompt": prompt, "completion": completion})
        assert encoded["prompt_ids"] == ids[prompt]
        assert encoded["input_ids"] == [*ids[prompt + completion], tokenizer.eos_token_id]
    crossing = encode(
        {"prompt": "hello wor", "completion": "ld! Größe"}
    )  # "world" is a token: the prompt has half of it
    assert crossing["prompt_ids"] == tokenizer("hello wor")["input_ids"]
    assert tokenizer.decode(crossing["input_ids"]) == "hello world! Größe</s>"
    assert not tokenizer.convert_ids_to_tokens(crossing["input_ids"])[len(crossing["prompt_ids"])].startswith("▁")


@pytest.mark.parametrize("kind", CORES)
def test_earlier_answers_whose_tokens_cross_into_the_template(kind):
    """Scored tokens lie inside the answers; the prompt keeps the ids that generation sees."""
    template = "{% for m in messages %}{{ m.role[:1] }} hel{{ m.content }}o wor{% endfor %}{% if add_generation_prompt %}a hel{% endif %}"
    tokenizer = tokenizer_of(ChatModel(template, "</s>"), kind)
    messages = chat("2+2", "lo world! hel", "3", "lo")
    encoded = encoder(tokenizer, train_on="all_turns", max_length=None, stop_ids=[tokenizer.eos_token_id])({"messages": messages})  # fmt: skip
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert encoded["prompt_ids"] == prompt
    earlier = [i for i in encoded["labels"][: len(prompt)] if i != IGNORE]
    assert tokenizer.decode(earlier).strip() in "lo world! helo wor"  # the template closes no answer
    assert "world" in tokenizer.decode(earlier)


@pytest.mark.parametrize("kind", CORES)
def test_a_text_prompt_loses_only_what_the_tokenizer_puts_behind_it(kind):
    tokenizer = tokenizer_of(CHAT_MODELS["phi-3"], kind)
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>", "<|assistant|>"])
    row = {"prompt": "<|user|>hello<|end|><|assistant|>", "completion": "world<|end|>"}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|endoftext|>",
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "<|endoftext|>")],
    )
    encoded = encoder(tokenizer, stop_ids=stops)(row)
    assert tokenizer.decode(encoded["prompt_ids"]).replace(" ", "") == "<s><|user|>hello<|end|><|assistant|>"
    assert scored(tokenizer, encoded).strip() == "world<|end|>"  # closed once
    tokenizer.chat_template = None
    shown = encode(tokenizer, [{"role": "user", "content": row["prompt"]}])  # by gkd.cli.chat
    assert shown["input_ids"].tolist() == [encoded["prompt_ids"]]


def test_a_stop_token_in_an_answer_is_not_its_end(tokenizer):
    encoded = encoder(tokenizer)({"messages": chat("How does a turn end?", "By <|end|>, always.")})
    assert scored(tokenizer, encoded) == "By <|end|>, always.<|end|>"


def test_a_template_that_leaves_the_answer_out_is_refused():
    tokenizer = make_tokenizer(TEMPLATE.replace("m.content", "m.text"))
    with pytest.raises(DataError, match="row 0: the chat template leaves the answer out"):
        encoder(tokenizer)({"messages": chat("hi?", "yes")}, 0)


@pytest.mark.parametrize(("name", "warned"), [("glm-4-moe", True), ("qwen3", False), ("phi-3", False)])
def test_a_template_that_closes_no_answer_is_told_of(name, warned):
    tokenizer = tokenizer_of(CHAT_MODELS[name], "byte-level")
    stops = tokenizer.convert_tokens_to_ids(CHAT_MODELS[name].stop_tokens)
    encode = encoder(tokenizer, stop_ids=stops, max_length=None)
    assert never_stops([encode({"messages": chat("hi?", "")})], stops) is None
    warning = never_stops([encode({"messages": chat("hi?", "yes")})], stops)
    assert bool(warned) == ("teaches the student to stop" in (warning or ""))


def test_rows_encoded_by_other_code_are_not_taken_from_the_disk(tokenizer, monkeypatch):
    """`datasets` finds cached rows by a hash of the encoder's fields, not of its code."""
    before = Hasher.hash(encoder(tokenizer))
    assert Hasher.hash(encoder(tokenizer)) == before
    monkeypatch.setattr(gkd.data.encoding.RowEncoder, "encoding", 99)
    newer = encoder(tokenizer)
    newer.encoding += 1
    assert Hasher.hash(newer) != before
