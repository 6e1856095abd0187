"""A row in any of the formats that people have -> chat messages that end in an assistant answer, empty or not."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gkd.rows import DataError

Message = dict[str, Any]
Row = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "function_call",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
# A column goes by several names; the first that holds something counts.
_INPUTS = ("input", "context")
_QUESTIONS = ("question", "query")
_ANSWERS = ("output", "completion", "response", "answer")
# Columns that reach the chat template beside the messages.
_KEPT = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Options:
    """What a format can't know by itself: the columns of translation pairs, a system prompt, a template."""

    source_field: str | None = None
    target_field: str | None = None
    system: str | None = None
    template: str = "{source}"
    drop_answers: bool = False


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _columns(row: Row) -> str:
    return ", ".join(map(repr, list(row)[:8])) or "nothing"


def _text(row: Row, field: str, needed: bool = False) -> str:
    value = _given(row, field) if needed else row.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{field!r} must be text, not {_kind(value)}.")
    if needed and not value.strip():
        raise DataError(f"{field!r} is empty.")
    return value


def _content(value: Any, where: str) -> str:
    """Text, or the joined text parts of a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts = []
        for part in value:
            if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else _kind(part)
                raise DataError(f"{where} has a part that is not text ({kind!r:.40}); gkd trains on text only.")
            parts.append(part["text"])
        return "".join(parts)
    raise DataError(f"{where} must be text, not {_kind(value)}.")


def _parsed(value: Any, where: str) -> Any:
    """A value that a CSV cell or an older export keeps as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{where} is text that is not JSON.") from None


def _messages(value: Any, column: str, role_key: str, content_key: str) -> list[Message]:
    value = _parsed(value, column)
    if not isinstance(value, list) or not value:
        raise DataError(f"{column!r} must be a non-empty list of messages, not {_kind(value)}.")
    messages = []
    for index, message in enumerate(value):
        if isinstance(message, dict) and len(message) == 2:  # the plain case, which most messages are
            name, content = message.get(role_key), message.get(content_key)
            plain = isinstance(content, str) and name in ("user", "assistant", "system")
            if plain and (content.strip() or name == "assistant"):
                messages.append(message if role_key == "role" else {"role": name, "content": content})
                continue
        new = _message(message, f"{column}[{index}]", role_key, content_key)
        if new["role"] != "system" or new["content"]:
            messages.append(new)
    return messages


def _message(message: Any, where: str, role_key: str, content_key: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{where} must be an object, not {_kind(message)}.")
    name, content = message.get(role_key), message.get(content_key)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{where} has the unknown {role_key} {name!r:.40}; known are {', '.join(ROLES)}.")
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [_tool_call(_parsed(content, where), where)]}
    new: Message = {"role": role, "content": ""}
    new |= {key: extra for key, extra in message.items() if key not in (role_key, content_key) and extra is not None}
    calls = new.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise DataError(f"{where}.tool_calls must be a list of objects.")
    if content is not None or not (role == "assistant" and calls):
        new["content"] = _content(content, f"{where}.{content_key}")
    if role == "user" and not new["content"].strip():
        raise DataError(f"{where} is an empty question.")
    return new


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    if not (isinstance(call, dict) and isinstance(call.get("name"), str)):
        raise DataError(f"{where}: a function call needs a 'name' and 'arguments'.")
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def _given(row: Row, column: str) -> Any:
    value = row.get(column)
    if value is None:
        raise DataError(f"no {column!r}; the row has {_columns(row)}.")
    return value


def _first(row: Row, names: tuple[str, ...]) -> str:
    return next((name for name in names if row.get(name) is not None), names[0])


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def from_messages(row: Row, options: Options) -> list[Message]:
    """`messages` of role and content, OpenAI's form: tool_calls, name and text parts too."""
    return _messages(_given(row, "messages"), "messages", "role", "content")


def from_sharegpt(row: Row, options: Options) -> list[Message]:
    """`conversations` of from and value (or of role and content)."""
    turns = _parsed(_given(row, "conversations"), "conversations")
    first = turns[0] if isinstance(turns, list) and turns else None
    keys = ("role", "content") if isinstance(first, dict) and "role" in first else ("from", "value")
    return _messages(turns, "conversations", *keys)


def from_alpaca(row: Row, options: Options) -> list[Message]:
    """`instruction`, `input` (or `context`), `output` (or `response`), `history` ([[question, answer], ...])."""
    question = _text(row, "instruction", needed=True)
    if extra := _text(row, _first(row, _INPUTS)):
        question += "\n" + extra
    messages = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise DataError("'history' must be a list of [question, answer] pairs.")
    for turn in history:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise DataError("'history' must be a list of [question, answer] pairs.")
        messages += _turn(*turn)
    return messages + _turn(question, _text(row, _first(row, _ANSWERS)))


def from_prompt(row: Row, options: Options) -> list[Message]:
    """`prompt`, with an optional `completion`, `response`...: text becomes a user's message, lists stay as they are."""
    answer = _first(row, _ANSWERS)
    if isinstance(_given(row, "prompt"), list):
        messages = _messages(row["prompt"], "prompt", "role", "content")
        return messages + (_messages(row[answer], answer, "role", "content") if row.get(answer) else [])
    return _turn(_text(row, "prompt", needed=True), _text(row, answer))


def from_question(row: Row, options: Options) -> list[Message]:
    """`question` or `query`, with an optional `answer` or `response`."""
    return _turn(_text(row, _first(row, _QUESTIONS), needed=True), _text(row, _first(row, _ANSWERS)))


def from_translation(row: Row, options: Options) -> list[Message]:
    """Two columns named by --source-field and --target-field, also inside a `translation` column."""
    pair = row["translation"] if isinstance(row.get("translation"), dict) else row
    target = "" if options.drop_answers else _text(pair, options.target_field, needed=True)
    return _turn(options.template.replace("{source}", _text(pair, options.source_field, needed=True)), target)


FORMATS: dict[str, Callable[[Row, Options], list[Message]]] = {
    "messages": from_messages,
    "sharegpt": from_sharegpt,
    "alpaca": from_alpaca,
    "translation": from_translation,
    "prompt": from_prompt,
    "question": from_question,
}
_BY_COLUMN = {
    "messages": "messages",
    "conversations": "sharegpt",
    "instruction": "alpaca",
    "prompt": "prompt",
    "question": "question",
    "query": "question",
}


def detect(row: Any, options: Options) -> tuple[str, str]:
    """The format of a row, and the evidence for it.

    Raises:
        DataError: the row is of no known format.
    """
    if not isinstance(row, dict):
        raise DataError(f"must be an object, not {_kind(row)}.")
    if options.source_field:
        return "translation", f"--source-field {options.source_field}"
    for column, name in _BY_COLUMN.items():
        if row.get(column) is not None:
            return name, f"column {column!r}"
    raise DataError(
        f"unknown format: the row has {_columns(row)}, and none of {', '.join(map(repr, _BY_COLUMN))}. For translation "
        "pairs name --source-field and --target-field."
    )


def to_chat(row: Any, name: str, options: Options) -> Row:
    """`messages` that end in an assistant's message, and the columns that the chat template reads.

    Raises:
        DataError: what is wrong with the row, without its place.
    """
    if not isinstance(row, dict):
        raise DataError(f"must be an object, not {_kind(row)}.")
    messages = FORMATS[name](row, options)
    roles = [message["role"] for message in messages]
    if "user" not in roles and "tool" not in roles:
        raise DataError("nobody asks anything: there is no user message.")
    if roles[-1] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    elif options.drop_answers:
        messages[-1] = {"role": "assistant", "content": ""}
    if roles[0] != "system" and (system := _text(row, "system") or options.system):
        messages.insert(0, {"role": "system", "content": system})
    chat: Row = {"messages": messages}
    for column in _KEPT:
        if row.get(column):
            chat[column] = _parsed(row[column], column)
    return chat
