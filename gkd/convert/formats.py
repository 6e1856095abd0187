"""Converts a row of any common format to chat messages that end in an assistant answer, which may be empty."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from gkd.data.rows import DataError

Message = dict[str, Any]
Row = dict[str, Any]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    "function_call": "function_call",
    **dict.fromkeys(("tool", "function", "function_response", "observation"), "tool"),
}
# A column has several names; the first that holds something counts.
_INPUTS = ("input", "context")
_QUESTIONS = ("question", "query")
_ANSWERS = ("output", "completion", "response", "answer")
_MAYBE_ANSWERS = ("target", "chosen")  # where they have the prompt's type; elsewhere they may be a label, say
_SYSTEMS = ("system", "system_prompt")
# Columns that are passed to the chat template besides the messages.
_KEPT = ("tools", "chat_template_kwargs")

# What a row holds that is not written. The words are the same for each row, so that they can be counted.
Remarks = list[str]


@dataclass(frozen=True)
class Options:
    """What the user decides: columns of translation pairs, a system prompt, a template, whether answers are kept."""

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
    value = _required(row, field) if needed else row.get(field)
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
            has_text = isinstance(part, dict) and isinstance(part.get("text"), str)
            if not has_text or part.get("type", "text") not in ("text", "input_text", "output_text"):
                kind = part.get("type") if isinstance(part, dict) else _kind(part)
                raise DataError(f"{where} has a part that is not text ({kind!r:.40}); gkd trains on text only.")
            parts.append(part["text"])
        return "".join(parts)
    raise DataError(f"{where} must be text, not {_kind(value)}.")


def _parsed(value: Any, where: str) -> Any:
    """Parses a value that a CSV cell or an older export holds as JSON text."""
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
            if plain and (name != "user" or content.strip()):
                messages.append(message if role_key == "role" else {"role": name, "content": content})
                continue
        messages.append(_message(message, f"{column}[{index}]", role_key, content_key))
    return messages


def _message(message: Any, where: str, role_key: str, content_key: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{where} must be an object, not {_kind(message)}.")
    name, content = message.get(role_key), message.get(content_key)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{where} has the unknown {role_key} {name!r:.40}; known are {', '.join(ROLES)}.")
    extras = {key: extra for key, extra in message.items() if key not in (role_key, content_key) and extra is not None}
    if role == "function_call":
        calls = [_tool_call(_parsed(content, where), where)]
        return {"role": "assistant", "content": "", "tool_calls": calls} | extras
    new: Message = {"role": role, "content": ""} | extras
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
    return {"type": "function", "function": {"name": call["name"], "arguments": {}} | call}


def _required(row: Row, column: str) -> Any:
    value = row.get(column)
    if value is None:
        raise DataError(f"no {column!r}; the row has {_columns(row)}.")
    return value


def _filled(value: Any) -> bool:
    """Whether a cell holds something: 0 and False do, white space and empty lists don't."""
    return bool(value.strip()) if isinstance(value, str) else value is not None and value != [] and value != {}


def _first(row: Row, names: tuple[str, ...], remarks: Remarks) -> str:
    """The first of these columns that holds something; adds remarks on others that hold something else."""
    filled = [name for name in names if _filled(row.get(name))]
    for name in filled[1:]:
        if row[name] != row[filled[0]]:
            remarks.append(f"{name!r} differs from {filled[0]!r}, which is used")
    return filled[0] if filled else next((name for name in names if row.get(name) is not None), names[0])


def _answer_names(row: Row, kind: type) -> tuple[str, ...]:
    return _ANSWERS + tuple(name for name in _MAYBE_ANSWERS if isinstance(row.get(name), kind))


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def from_messages(row: Row, options: Options, remarks: Remarks) -> list[Message]:
    """`messages` of role and content, OpenAI's form: tool_calls, name and text parts too."""
    messages = _messages(_required(row, "messages"), "messages", "role", "content")
    if "prompt" in row and _filled(row["prompt"]) and not _repeats(row["prompt"], messages):
        remarks.append("'prompt' differs from 'messages', which is used")
    return messages


def _repeats(prompt: Any, messages: list[Message]) -> bool:
    """Whether a prompt repeats messages, the text of one, or the text that a chat template makes of them."""
    if prompt in (messages[:-1], messages):
        return True
    texts = [message["content"] for message in messages]
    return isinstance(prompt, str) and (prompt in texts or all(text in prompt for text in texts[:-1]))


def from_sharegpt(row: Row, options: Options, remarks: Remarks) -> list[Message]:
    """`conversations` of from and value (or of role and content)."""
    turns = _parsed(_required(row, "conversations"), "conversations")
    first = turns[0] if isinstance(turns, list) and turns else None
    keys = ("role", "content") if isinstance(first, dict) and "role" in first else ("from", "value")
    return _messages(turns, "conversations", *keys)


def from_alpaca(row: Row, options: Options, remarks: Remarks) -> list[Message]:
    """`instruction`, `input` (or `context`), `output` (or `response`), `history` ([[question, answer], ...])."""
    question = _text(row, "instruction", needed=True)
    if extra := _text(row, _first(row, _INPUTS, remarks)):
        question += "\n" + extra
    messages = []
    history = row.get("history") or []
    for turn in history if isinstance(history, list) else [None]:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise DataError("'history' must be a list of [question, answer] pairs.")
        messages += _turn(*turn)
    return messages + _turn(question, _text(row, _first(row, _answer_names(row, str), remarks)))


def from_prompt(row: Row, options: Options, remarks: Remarks) -> list[Message]:
    """`prompt`, with an optional `completion`, `response`...: text becomes a user's message, lists stay as they are."""
    prompt = _required(row, "prompt")
    answer = _first(row, _answer_names(row, type(prompt)), remarks)
    if isinstance(prompt, list):
        messages = _messages(prompt, "prompt", "role", "content")
        return messages + (_messages(row[answer], answer, "role", "content") if row.get(answer) else [])
    return _turn(_text(row, "prompt", needed=True), _text(row, answer))


def from_question(row: Row, options: Options, remarks: Remarks) -> list[Message]:
    """`question` or `query`, with an optional `context` (or `input`) behind it, and an `answer` or `response`."""
    question = _text(row, _first(row, _QUESTIONS, remarks), needed=True)
    inputs = tuple(name for name in _INPUTS if isinstance(row.get(name), str) and _filled(row[name]))
    if inputs:
        question += "\n" + row[_first(row, inputs, remarks)]
    return _turn(question, _text(row, _first(row, _answer_names(row, str), remarks)))


def from_translation(row: Row, options: Options, remarks: Remarks) -> list[Message]:
    """Two columns named by --source-field and --target-field, also inside a `translation` column."""
    pair = row["translation"] if isinstance(row.get("translation"), dict) else row
    fields = {options.source_field, options.target_field}
    if pair is row:
        if "translation" not in fields and _filled(row.get("translation")):
            remarks.append(_not_used("translation"))
    else:
        remarks += [_not_used(f"translation.{name}") for name in pair if name not in fields and _filled(pair[name])]
        remarks += [_not_used(name) for name in fields if _filled(row.get(name))]
    target = "" if options.drop_answers else _text(pair, options.target_field, needed=True)
    return _turn(options.template.replace("{source}", _text(pair, options.source_field, needed=True)), target)


class Format(NamedTuple):
    """How rows are read, and the columns that are: always, or only where they have the prompt's type."""

    read: Callable[[Row, Options, Remarks], list[Message]]
    columns: set[str]
    typed: tuple[str, ...] = ()


_ANY = {*_SYSTEMS, *_KEPT}
FORMATS = {
    "messages": Format(from_messages, {"messages", "prompt"} | _ANY),
    "sharegpt": Format(from_sharegpt, {"conversations"} | _ANY),
    "alpaca": Format(from_alpaca, {"instruction", "history", *_INPUTS, *_ANSWERS} | _ANY, _MAYBE_ANSWERS),
    "translation": Format(from_translation, {"translation"} | _ANY),  # and those that the user names
    "prompt": Format(from_prompt, {"prompt", *_ANSWERS} | _ANY, _MAYBE_ANSWERS),
    "question": Format(from_question, {*_QUESTIONS, *_ANSWERS} | _ANY, (*_MAYBE_ANSWERS, *_INPUTS)),
}
# The format by the first of these columns that a row has.
_BY_COLUMN = {
    "messages": "messages",
    "conversations": "sharegpt",
    "instruction": "alpaca",
    "prompt": "prompt",
    "question": "question",
    "query": "question",
}


def _not_used(column: str) -> str:
    return f"{column!r} is not used"


def _unused(row: Row, name: str, options: Options) -> list[str]:
    """The columns that hold something and are not read."""
    _, read, typed = FORMATS[name]
    if name == "translation":
        read = read | {options.source_field, options.target_field}
    if row.keys() <= read:
        return []
    kind = type(row.get("prompt")) if name == "prompt" else str
    beside = (column for column in row if column not in read and _filled(row[column]))
    return [column for column in beside if not (column in typed and isinstance(row[column], kind))]


def detect(row: Any, options: Options) -> tuple[str, str]:
    """The format of a row, and the evidence for it. Raises DataError if it has no known format."""
    if not isinstance(row, dict):
        raise DataError(f"must be an object, not {_kind(row)}.")
    if options.source_field:
        return "translation", f"--source-field {options.source_field}"
    for holds in (_filled, lambda value: value is not None):
        for column, name in _BY_COLUMN.items():
            if holds(row.get(column)):
                return name, f"column {column!r}"
    raise DataError(
        f"unknown format: the row has {_columns(row)}, and none of {', '.join(map(repr, _BY_COLUMN))}. For translation "
        "pairs name --source-field and --target-field."
    )


def to_chat(row: Any, name: str, options: Options) -> tuple[Row, Remarks]:
    """`messages` that end in an assistant's message, with columns that the template reads; and remarks on the rest.
    Raises DataError, which says what is wrong with the row, without its place."""
    if not isinstance(row, dict):
        raise DataError(f"must be an object, not {_kind(row)}.")
    remarks: Remarks = []
    messages = FORMATS[name].read(row, options, remarks)
    roles = [message["role"] for message in messages]
    if "user" not in roles and "tool" not in roles:
        raise DataError("nobody asks anything: there is no user message.")
    if roles[-1] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    elif options.drop_answers:
        messages[-1] = {"role": "assistant", "content": ""}
    row_system = "" if row.keys().isdisjoint(_SYSTEMS) else _text(row, _first(row, _SYSTEMS, remarks))
    system = row_system if row_system.strip() else options.system
    if roles[0] != "system":
        if system:
            messages.insert(0, {"role": "system", "content": system})
    elif not messages[0]["content"].strip():
        if system:
            messages[0] = messages[0] | {"content": system}
    elif row_system.strip() and row_system != messages[0]["content"]:
        remarks.append("the column of system prompts differs from the system turn, which is used")
    chat: Row = {"messages": messages}
    for column in _KEPT:
        if row.get(column):
            chat[column] = _parsed(row[column], column)
    remarks += map(_not_used, _unused(row, name, options))
    return chat, remarks
