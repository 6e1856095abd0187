"""Chat templates of 22 models, 7 conversations each: the scored ids are those of the whole templated text, or the row is
refused with advice that works. The reference knows nothing of gkd: the template's text, its ids, and where they part."""

import re
from dataclasses import replace

import pytest
from chat_models import CHAT_MODELS, CORES, PLAIN_TOOLS, tokenizer_of

from gkd.collator import IGNORE, RowEncoder
from gkd.rows import DataError

USER = {"role": "user", "content": "What is 2+2?"}
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
CONVERSATIONS = {
    "system": [{"role": "system", "content": "Be kind."}, USER, {"role": "assistant", "content": "The answer is four."}],
    "no system": [USER, {"role": "assistant", "content": "4"}],
    "multi-turn": [
        USER,
        {"role": "assistant", "content": "four, I think"},
        {"role": "user", "content": "And 3+3?"},
        {"role": "assistant", "content": "6"},
    ],
    "tools": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ],
    "empty": [USER, {"role": "assistant", "content": ""}],
    "think": [USER, {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\nfour"}],
    "unicode": [
        {"role": "user", "content": "Größe 你好 🙂?"},
        {"role": "assistant", "content": "«Größe» — 你好 🙂\tnaïve\n\nline 2"},
    ],
}  # fmt: skip


def plain(messages):
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def expected(tokenizer, model, messages, tools, settings):
    """ids and labels: of the whole templated text, up to what closes the last answer."""
    messages = plain(messages)
    if settings.system_as_user and messages[0]["role"] == "system":
        first = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
        messages = [first, *messages[2:]]
    variables = settings.chat_template_kwargs or {}

    def text(part, ask):
        return tokenizer.apply_chat_template(
            part, tools=tools, tokenize=False, add_generation_prompt=ask, **variables
        )

    def ids(part):
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    end = "<|im_end|>" if tokenizer.chat_template == PLAIN_TOOLS else model.end
    *history, last = messages
    prompt = text(history, True)
    if not last.get("content"):
        whole, closes = prompt, len(prompt)
    else:
        whole = text(messages, False)
        if prompt.endswith("<think>\n") and not whole.startswith(prompt):  # the thinking is opened, and left out later
            thought, _, answer = last["content"].removeprefix("<think>\n").rpartition("\n</think>\n\n")
            whole = prompt + thought + "\n</think>\n\n" + answer + end
        assert whole.startswith(prompt)
        closes = whole.rindex(end) + len(end) if end else len(whole)
    ids_of_all = ids(whole[:closes])
    scored = [False] * len(ids_of_all)
    spans = [(len(prompt), closes)]
    if settings.train_on == "all_turns":
        for position, message in enumerate(history):
            if message["role"] == "assistant":
                start = len(text(history[:position], True))
                spans.append((start, whole.index(end, start) + len(end) if end else len(text(history[: position + 1], False))))
    for start, stop in spans:
        first, behind = len(ids(whole[:start])), len(ids(whole[:stop]))
        assert ids_of_all[:first] == ids(whole[:start])
        assert ids_of_all[:behind] == ids(whole[:stop])
        scored[first:behind] = [True] * (behind - first)
    assert tokenizer.apply_chat_template(history, tools=tools, add_generation_prompt=True, return_dict=False, **variables) == ids(prompt)
    return ids(prompt), ids_of_all, [i if s else IGNORE for i, s in zip(ids_of_all, scored, strict=True)]


def with_advice(encoder, advice):
    """The encoders that a message's advice leads to."""
    for flags in re.split(r", or with ", re.sub(r".*It passes with |\.$", "", advice)):
        changes = {}
        if "--system_as_user" in flags:
            changes["system_as_user"] = True
        if "--train_on last_turn" in flags:
            changes["train_on"] = "last_turn"
        if given := re.search(r"--chat_template_kwargs '(.*?)'", flags):
            import json

            changes["chat_template_kwargs"] = json.loads(given[1])
        if "give another --chat_template_path" in flags:
            encoder.tokenizer.chat_template = PLAIN_TOOLS
        yield replace(encoder, **changes)


TABLE = {}


@pytest.mark.parametrize("kind", CORES)
@pytest.mark.parametrize("name", CHAT_MODELS)
def test_every_conversation_is_exact_or_refused_with_advice(name, kind):
    model = CHAT_MODELS[name]
    for train_on in ("last_turn", "all_turns"):
        for title, messages in CONVERSATIONS.items():
            tokenizer = tokenizer_of(model, kind)
            tools = [ADD] if title == "tools" else None
            stops = tokenizer.convert_tokens_to_ids(model.stop_tokens + ["<|im_end|>"])
            encoder = RowEncoder(tokenizer, None, 0, train_on, stops)
            row = {"messages": messages, "tools": tools}
            try:
                encoded = [encoder(row, 5)]
                settings, verdict = [encoder], "exact"
            except DataError as error:
                verdict = str(error)
                assert verdict.startswith("row 5: ")
                settings = list(with_advice(encoder, verdict))
                assert settings
                encoded = [setting(row) for setting in settings]
            TABLE[kind, name, train_on, title] = verdict
            for setting, result in zip(settings, encoded, strict=True):
                prompt, ids, labels = expected(tokenizer, model, messages, tools, setting)
                assert (result["prompt_ids"], result["input_ids"], result["labels"]) == (prompt, ids, labels), (title, train_on)
