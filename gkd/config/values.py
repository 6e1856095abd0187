"""What the values of flags must be."""

import importlib.util
import json
import math
from collections.abc import Iterable
from dataclasses import field, fields, make_dataclass
from typing import Any

DTYPES = ("auto", "bfloat16", "float16", "float32")


def optional(kind: type) -> type:
    """A dataclass of flags with None for those that are not given."""
    names = [(f.name, f.type | None, field(default=None, metadata=f.metadata)) for f in fields(kind)]
    return make_dataclass(f"Optional{kind.__name__}", names, bases=(kind,))


def need(flag: str, package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{flag} needs {package}, which is not installed: pip install -e '.[{extra}]'.")


def json_object(flag: str, value: Any) -> dict[str, Any] | None:
    """The value of a flag that takes a JSON object, parsed if it is text.

    Raises:
        ValueError: it is no JSON, or no object. The value is not repeated: it may hold a token.
    """
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"--{flag} is not JSON: {error.msg}, character {error.pos}.") from None
    if not isinstance(value, dict | None):
        raise ValueError(f"--{flag} must be a JSON object such as '{{\"name\": 1}}'.")
    return value


def check_room(args: Any) -> None:
    """Raises ValueError where a completion leaves no room for a prompt."""
    if args.max_length is not None and args.max_new_tokens >= args.max_length:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in --max_length {args.max_length}: a "
            "sequence is prompt and completion together."
        )


def check_positive(args: Any, names: Iterable[str]) -> None:
    """Raises ValueError for a number that is not above 0, or has no end; None, for one that is not set, passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be positive, not {value}.")


def check_seed(args: Any, *names: str) -> None:
    """Raises ValueError for a seed that NumPy does not take; None passes."""
    for name in names:
        if not 0 <= (getattr(args, name) or 0) < 2**32:
            raise ValueError(f"--{name} must lie in [0, {2**32 - 1}], not {getattr(args, name)}.")
