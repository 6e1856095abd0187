"""Renders a row by its chat template: the prompt, and the answer as a model would write it after that prompt."""

import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gkd.data.continuation import common_prefix
from gkd.data.rows import DataError
from gkd.io.errors import one_line

# Template variables that decide whether thinking is written, or kept in earlier turns.
SWITCHES = ("enable_thinking", "thinking", "clear_thinking", "preserve_thinking", "keep_past_thinking")
_THINKING = ("reasoning_content", "reasoning", "thinking")  # a message's keys, as transformers knows them


class TemplateProblem(DataError):
    """The chat template refuses a row, or does not render it as a prompt followed by the answer."""


@dataclass
class Template:
    """The tokenizer's chat template with the tools and variables of a row and the flags.

    With `system_as_user`, the system's turn is rendered as the beginning of the first user's. `stop_ids` end an answer.
    """

    tokenizer: PreTrainedTokenizerBase
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]
    system_as_user: bool
    stop_ids: list[int]

    def render(self, messages: list[dict[str, Any]], ask: bool) -> str:
        """The messages as text; with `ask`, followed by what opens the next answer."""
        messages = _system_as_user(messages) if self.system_as_user else messages
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=self.tools, tokenize=False, add_generation_prompt=ask, **self.variables
            )
        except Exception as error:  # a template is foreign code: undefined names, null + "text", errors of its own
            reason = one_line(error)[:300]
            calls = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
            why = f"{', perhaps for their tool calls' if calls else ''}: {reason.removesuffix('.')}"
            raise TemplateProblem(f"the chat template refuses its messages{why}.") from error

    def answer(self, messages: list[dict[str, Any]], prompt: str) -> str:
        """The text of the last message after a prompt, up to its stop token: what a model would generate.

        What the template writes after the stop token (often a line feed) is left out: no generated answer has it.

        Raises:
            TemplateProblem: the template changes the prompt once there is an answer, or leaves the answer out.
        """
        message, whole = messages[-1], self.render(messages, False)
        answer = whole[len(prompt) :] if whole.startswith(prompt) else _behind_opened_thinking(prompt, whole, message)
        if answer is None:
            raise TemplateProblem(
                "the templated prompt is not the beginning of the templated conversation, so tokens would move "
                f"between prompt and answer: {difference(prompt, whole)}"
            )
        body = message.get("content")
        body = body.strip() if isinstance(body, str) else ""
        end = answer.find(body) + len(body) if body in answer else 0  # a stop token inside the text does not end it
        stops = filter(None, (self.tokenizer.decode([i]) for i in self.stop_ids))
        closed = min(((at, -len(stop)) for stop in stops if (at := answer.find(stop, end)) >= 0), default=None)
        if not answer[: closed[0] if closed else None].strip():
            raise TemplateProblem("the chat template leaves the answer out.")
        for call in message.get("tool_calls") or []:
            name = (call.get("function") or call).get("name")
            if name and name not in answer:
                raise TemplateProblem(f"the chat template leaves out the answer's call of {name!r}.")
        return answer[: closed[0] - closed[1]] if closed else answer


def _system_as_user(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the system's turn moved to the beginning of the user's after it, an empty line between."""
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return messages
    system, user = (message["content"] for message in messages[:2])
    if isinstance(system, str) and isinstance(user, str):
        content: Any = f"{system}\n\n{user}"
    else:
        parts = [[{"type": "text", "text": part}] if isinstance(part, str) else part for part in (system, user)]
        content = parts[0] + [{"type": "text", "text": "\n\n"}] + parts[1]
    return [messages[1] | {"content": content}, *messages[2:]]


def _behind_opened_thinking(prompt: str, whole: str, message: dict[str, Any]) -> str | None:
    """The answer after a prompt that opens <think> itself, as DeepSeek-R1's does; None if it doesn't.

    Such a template writes <think> with the answer again, or leaves the thinking out. A model that answers the prompt
    writes its thinking, if any, then </think>, then the rest.
    """
    opened = re.search(r"<think>\s*\Z", prompt)
    if opened is None or not whole.startswith(prompt[: opened.start()]):
        return None
    rest = whole[opened.start() :]
    if "</think>" in rest:
        return rest.removeprefix("<think>").lstrip("\n")
    content = message.get("content")
    thought = next((message[name] for name in _THINKING if message.get(name)), "")
    if isinstance(content, str) and "</think>" in content:
        thought = content.split("</think>")[0].split("<think>")[-1]
    thought = thought.strip("\n")
    return (f"{thought}\n" if thought else "") + "</think>\n\n" + rest.lstrip("\n")


def difference(a: str, b: str) -> str:
    """Where two texts begin to differ, for an error message."""
    at = common_prefix(a, b)
    return f"they part at character {at}, {a[at : at + 40]!r} against {b[at : at + 40]!r}."
