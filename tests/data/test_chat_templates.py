"""Chat templates of 22 models, 7 conversations each: what is scored are the ids of the whole templated text between what
stands before and behind the answer, or the row is refused with advice that works. The reference knows nothing of gkd."""

import json
import re
from dataclasses import replace

import pytest
from chat_models import CHAT_MODELS, CORES, PLAIN_TOOLS, tokenizer_of

from gkd.data.batch import IGNORE
from gkd.data.encoding import RowEncoder
from gkd.data.rows import DataError

USER = {"role": "user", "content": "What is 2+2?"}
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}


def says(content, **more):
    return {"role": "assistant", "content": content, **more}


CONVERSATIONS = {
    "system": [{"role": "system", "content": "Be kind."}, USER, says("The answer is four.")],
    "no system": [USER, says("4")],
    "multi-turn": [USER, says("four, I think"), {"role": "user", "content": "And 3+3?"}, says("6")],
    "tools": [USER, says(None, tool_calls=[CALL]), {"role": "tool", "name": "add", "content": "4"}, says("It is 4.")],
    "empty": [USER, says("")],
    "<think>": [USER, says("<think>\nTwo and two.\n</think>\n\nfour")],
    "unicode": [{"role": "user", "content": "Größe 你好 🙂?"}, says("«Größe» — 你好 🙂\tnaïve\n\nline 2")],
}


NO_TOOLS = (
    "llama-2 mistral-v0.1 zephyr chatml vicuna phi-3 phi-4 gemma-2 gemma-3 deepseek-r1-0528 deepseek-r1-distill aya"
)
NO_SYSTEM = "mistral-v0.1 mistral-v0.3 gemma-2"
OTHERWISE_LATER = {  # earlier answers lose their thinking, or are closed otherwise
    "multi-turn": "qwen3 qwen3-thinking-2507 deepseek-r1-0528 deepseek-r1-distill gpt-oss",
    "tools": "llama-3 qwen3 qwen3-thinking-2507",
}


def refused_with(name, title, train_on):
    """The advice at the end of a refusal; None if the row is encoded."""
    if title == "tools" and name in NO_TOOLS.split():
        return "No other flag helps: give another --chat_template_path, or leave such rows out."
    if title == "system" and name in NO_SYSTEM.split():
        return "It passes with --system_as_user."
    if train_on == "all_turns" and name in OTHERWISE_LATER.get(title, "").split():
        return "It passes with --train_on last_turn."
    return None


def reference(tokenizer, model, messages, tools, setting):
    """`prompt_ids`, `input_ids` and `labels`, computed from the templated text alone."""
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if setting.system_as_user and messages[0]["role"] == "system":
        first = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
        messages = [first, *messages[2:]]
    options = {"tools": tools, **(setting.chat_template_kwargs or {})}
    *history, last = messages

    def text(part, ask):
        return tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=ask, **options)

    def ids(part):
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    def behind(message, whole, start):
        """Where an answer ends: after the text that closes it."""
        close = (model.call_end if message.get("tool_calls") else "") or model.end
        close = "<|im_end|>" if tokenizer.chat_template == PLAIN_TOOLS else close
        return whole.index(close, start) + len(close) if close else None

    prompt = text(history, True)
    assert tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False, **options) == ids(
        prompt
    )
    if not last["content"]:
        return ids(prompt), ids(prompt), [IGNORE] * len(ids(prompt))
    whole = text(messages, False)
    if prompt.endswith("<think>\n") and not whole.startswith(prompt):  # opened in the prompt, and left out later
        opened = prompt.removesuffix("<think>\n")
        assert whole.startswith(opened)
        thought = last["content"].removeprefix("<think>\n").rpartition("</think>\n\n")[0]
        whole = prompt + thought + "</think>\n\n" + whole.removeprefix(opened).lstrip("\n")
    assert whole.startswith(prompt)
    whole = whole[: behind(last, whole, len(prompt))]
    if ids(whole)[: len(ids(prompt))] != ids(prompt):  # a token crosses the border: the model has written half of it
        assert whole[len(prompt) - 1 : len(prompt) + 1] == "\n\n"
        return ids(prompt), ids(prompt) + ids(whole[len(prompt) :]), None
    spans = [(len(prompt), len(whole))]
    for position, message in enumerate(history if setting.train_on == "all_turns" else ()):
        if message["role"] == "assistant":
            start = len(text(history[:position], True))
            spans.append((start, behind(message, whole, start) or len(text(history[: position + 1], False))))
    labels = [IGNORE] * len(ids(whole))
    for span in spans:
        first, end = (len(ids(whole[:place])) for place in span)
        assert ids(whole)[:end] == ids(whole[: span[1]])
        labels[first:end] = ids(whole)[first:end]
    return ids(prompt), ids(whole), labels


def advised(encoder, message):
    """The encoders with the flags that an error's advice names."""
    if message.endswith("No other flag helps: give another --chat_template_path, or leave such rows out."):
        encoder.tokenizer.chat_template = PLAIN_TOOLS
        return [encoder]
    found = []
    for flags in message.rstrip(".").split(" It passes with ")[1].split(", or with "):
        changes = {"system_as_user": True} if "--system_as_user" in flags else {}
        changes |= {"train_on": "last_turn"} if "--train_on last_turn" in flags else {}
        for variables in re.findall(r"--chat_template_kwargs '(.*?)'", flags):
            changes["chat_template_kwargs"] = json.loads(variables)
        assert changes
        found.append(replace(encoder, **changes))
    return found


@pytest.mark.parametrize("kind", CORES)
@pytest.mark.parametrize("name", CHAT_MODELS)
def test_each_conversation_is_exact_or_refused_with_advice_that_works(name, kind):
    model = CHAT_MODELS[name]
    for train_on in ("last_turn", "all_turns"):
        for title, messages in CONVERSATIONS.items():
            tokenizer = tokenizer_of(model, kind)
            stops = tokenizer.convert_tokens_to_ids([*model.stop_tokens, "<|im_end|>"])
            row = {"messages": messages, "tools": [ADD] if title == "tools" else None}
            encoder, verdict = RowEncoder(tokenizer, None, 0, train_on, stops), "exact"
            settings = [encoder]
            try:
                encoder(row, 5)
            except DataError as error:
                verdict = str(error)
                assert verdict.startswith("row 5: ")
                assert "\n" not in verdict
                settings = advised(encoder, verdict)
            advice = refused_with(name, title, train_on)
            assert verdict.endswith(advice) if advice else verdict == "exact", (train_on, title, verdict)
            for setting in settings:
                encoded = setting(row)
                prompt, ids, labels = reference(tokenizer, model, messages, row["tools"], setting)
                labels = [IGNORE] * len(prompt) + ids[len(prompt) :] if labels is None else labels
                assert encoded["prompt_ids"] == prompt, (train_on, title, verdict)
                assert encoded["input_ids"] == ids, (train_on, title, verdict)
                assert encoded["labels"] == labels, (train_on, title, verdict)
