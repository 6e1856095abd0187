"""What a row of prompts or conversations is, and what can be wrong with one. Imports no library, so it loads at once.

A row is one of

* `messages`, with an optional `prompt` (a list of messages, or templated text that the conversation begins with),
* `prompt` and `completion` (both text, or both lists of messages),
* `prompt` alone,

with optional `tools`, `chat_template_kwargs` and `teacher_prompt` (like `prompt`), which the teacher reads in its place; and `teacher`, of several teachers the name of the row's, or names with their shares. An empty assistant answer means "no answer": such a row has nothing
to learn from until the teacher (`seq_kd`) or the student (on-policy) writes one.
"""

from typing import Any

_SCHEMA = "A row needs `messages`, or `prompt` with an optional `completion` (see docs/data.md)."


class DataError(ValueError):
    """The data can't be used: which file and row, what is wrong, what to do."""


def encoded(text: str) -> bytes:
    """A text as UTF-8. Raises DataError if it is not valid Unicode."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        near = text[max(0, error.start - 12) : error.start]
        what = f"byte {code - 0xDC00:#x} does not decode" if 0xDC80 <= code <= 0xDCFF else "half of a surrogate pair"
        raise DataError(f"its text is not Unicode: {what}, after {near!r}.") from None


def _messages_problem(messages: Any, column: str) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f"`{column}` must be a non-empty list of messages."
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"`{column}[{position}]` must be an object with a `role` and a `content`."
        content = message.get("content")
        if not (content is None or isinstance(content, str | list)):
            return f"`{column}[{position}].content` must be text, not {type(content).__name__}."
        if content is None and message["role"] != "assistant":
            return f"`{column}[{position}].content` is missing."
    return None


def row_problem(row: Any) -> str | None:
    """What is wrong with a row and what to do, or None."""
    if not isinstance(row, dict):
        return f"not an object but {type(row).__name__}. {_SCHEMA}"
    messages, prompt, completion = row.get("messages"), row.get("prompt"), row.get("completion")
    if messages is None and prompt is None:
        if "instruction" in row:
            return "an alpaca row; convert the file first: python convert_data.py IN.json -o OUT.json"
        return f"neither `messages` nor `prompt`, but {', '.join(map(repr, row)) or 'nothing'}. {_SCHEMA}"
    if messages is not None and (problem := _messages_problem(messages, "messages")):
        return problem
    teacher_prompt = row.get("teacher_prompt")
    for column, value in (("prompt", prompt), ("completion", completion), ("teacher_prompt", teacher_prompt)):
        if isinstance(value, list):
            if problem := _messages_problem(value, column):
                return problem
        elif not (value is None or isinstance(value, str)):
            return f"`{column}` must be text or a list of messages, not {type(value).__name__}."
    if teacher_prompt == "" or (isinstance(teacher_prompt, list) and teacher_prompt[-1]["role"] == "assistant"):
        return "`teacher_prompt` must ask something: text, or messages of which the last is not the assistant's."
    if messages is None and completion is not None and type(prompt) is not type(completion):
        return "`prompt` and `completion` must both be text or both be lists of messages."
    if not isinstance(extra := row.get("chat_template_kwargs") or {}, dict):
        return f"`chat_template_kwargs` must be an object, not {type(extra).__name__}."
    if prompt == "" or (messages is not None and not any(m["role"] != "assistant" for m in messages)):
        return "the prompt is empty; there is nothing to answer."
    return None


def is_answer(message: dict[str, Any]) -> bool:
    """Whether a message is the assistant's and has text or tool calls; an empty one means "no answer"."""
    content = message.get("content")
    text = content.strip() if isinstance(content, str) else content
    return message["role"] == "assistant" and bool(text or message.get("tool_calls"))


def conversation_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The messages of a row, `prompt` + `completion` lists joined; None for plain text."""
    if row.get("messages") is not None:
        return row["messages"]
    if isinstance(row.get("prompt"), list):
        return row["prompt"] + (row.get("completion") or [])
    return None


def has_answer(row: dict[str, Any]) -> bool:
    """Whether the dataset holds an answer to this row."""
    messages = conversation_of(row)
    return is_answer(messages[-1]) if messages else bool((row.get("completion") or "").strip())


def answer_of(row: dict[str, Any]) -> str | None:
    """The text of a row's answer; None if it has none, or one that is not text (a tool call, say)."""
    if not has_answer(row):
        return None
    messages = conversation_of(row)
    answer = row["completion"] if messages is None else messages[-1].get("content")
    return answer.strip() if isinstance(answer, str) and answer.strip() else None


def prompt_of(row: dict[str, Any]) -> str:
    """What a row asks, for display: the user's text alone, or each message behind its role; "" if there is nothing."""
    messages = conversation_of(row)
    if messages is None:
        return str(row.get("prompt") or "").strip()
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if len(asked) == 1:
        return str(asked[0].get("content") or "").strip()
    return "\n".join(f"{message['role']}: {message.get('content') or ''}".strip() for message in asked)
