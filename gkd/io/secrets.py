"""Masks secrets by the names of their flags: records reach reports, model cards, checkpoints and trackers."""

import json
import re
from typing import Any

# `eos_token` and `pad_token` are no secrets.
_SECRET = re.compile(
    r"token|.*(hub|auth|access|api|hf|secret|bearer)_?token|.*api_?key|.*password|.*secret|.*credentials?|authorization",
    re.IGNORECASE,
)
_MASK = "***"


def is_secret(name: Any) -> bool:
    """Whether a flag or key of this name holds a secret: `hub_token`, or `token` in `--model_init_kwargs`."""
    return _SECRET.fullmatch(str(name).lstrip("-").replace("-", "_")) is not None


def public(value: Any) -> Any:
    """The value without secret keys, at any depth; what is no dict or list is returned unchanged."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items() if not is_secret(key)}
    return type(value)(map(public, value)) if type(value) in (list, tuple, set) else value


def without_secrets(argv: list[str]) -> list[str]:
    """A command line with secrets masked as `***`: `--hub_token X`, `--hub_token=X`, and keys of a JSON object."""
    words, hidden = [], False
    for word in argv:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if hidden and not flag:
            words.append(_MASK)
        elif is_secret(flag) and equals:
            words.append(f"{flag}={_MASK}")
        else:
            words.append(f"{flag}{equals}{_masked_json(value)}")
        hidden = bool(flag) and not equals and is_secret(flag)
    return words


def _masked_json(word: str) -> str:
    if not word.lstrip().startswith(("{", "[")):
        return word
    try:
        value = json.loads(word)
    except ValueError:  # broken, so it may hold a secret
        return _MASK
    masked = _masked(value)
    return word if masked == value else json.dumps(masked, ensure_ascii=False)


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _MASK if is_secret(key) else _masked(item) for key, item in value.items()}
    return [_masked(item) for item in value] if isinstance(value, list) else value
