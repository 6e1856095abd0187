"""Fields for flags, and checks of their values, shared by several commands."""

import importlib.util
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import field, fields, make_dataclass
from typing import Any

DTYPES = ("auto", "bfloat16", "float16", "float32")


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """The field of a flag; `metadata` may have its `choices`."""
    return field(default=default, metadata={"help": help, **metadata})


def number_or(word: str) -> Callable[[str], float | str]:
    """The parser of a flag that takes a number or one word."""

    def parse(text: str) -> float | str:
        return text if text == word else float(text)

    parse.__name__ = f"number or {word}"  # argparse names it in its message
    return parse


def optional(kind: type) -> type:
    """The same dataclass of flags, with None as their default."""
    names = [(f.name, f.type | None, flag(None, **f.metadata)) for f in fields(kind)]
    return make_dataclass(f"Optional{kind.__name__}", names, bases=(kind,))


def need(flag: str, package: str, extra: str) -> None:
    """Raises ValueError if the package that a flag needs is not installed; `extra`: of ours, which installs it."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{flag} needs {package}, which is not installed: pip install -e '.[{extra}]'.")


def parse_objects(args: Any, names: Iterable[str]) -> None:
    """Parses flags that take a JSON object, where they are text. Raises ValueError if one is no JSON object."""
    for name in names:
        value = getattr(args, name)
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except json.JSONDecodeError as error:
            # Without the value, which may hold a token.
            raise ValueError(f"--{name} is not JSON: {error.msg}, character {error.pos}.") from None
        if not isinstance(value, dict | None):
            raise ValueError(f"--{name} must be a JSON object such as '{{\"name\": 1}}'.")
        setattr(args, name, value)


def check_room(args: Any) -> None:
    """Raises ValueError if --max_new_tokens leaves no room for a prompt in --max_length."""
    if args.max_length is not None and args.max_new_tokens >= args.max_length:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in --max_length {args.max_length}: a "
            "sequence is prompt and completion together."
        )


def check_positive(args: Any, names: Iterable[str]) -> None:
    """Raises ValueError for a number that is not positive and finite; None, for a flag that is not set, passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be positive, not {value}.")


def check_seed(args: Any, *names: str) -> None:
    """Raises ValueError for a seed out of NumPy's range; None passes."""
    for name in names:
        if not 0 <= (getattr(args, name) or 0) < 2**32:
            raise ValueError(f"--{name} must lie in [0, {2**32 - 1}], not {getattr(args, name)}.")


def is_address(place: str) -> bool:
    """Whether a teacher is behind a server, not a folder or a model's name."""
    return place.startswith(("http://", "https://"))
