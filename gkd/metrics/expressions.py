"""Libraries that evaluate an answer as Python get numbers, lists and mathematics alone: models and rows run no code."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gkd.io.replaced import replaced

_HARMLESS = (
    *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Name, ast.Call, ast.keyword),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.Load),
)


def _check(code: str, names: dict[str, Any]) -> None:
    """Raises ValueError unless `code` is literals, operators, and mathematical objects and functions among `names`."""
    from sympy import Basic, cbrt, root, sqrt  # here, since importing it takes a while

    functions = (cbrt, root, sqrt, abs, max, min, pow, round, sum)
    for node in ast.walk(ast.parse(code.strip(), mode="eval")):
        if not isinstance(node, _HARMLESS):
            raise ValueError(f"{type(node).__name__} in an expression")
        if isinstance(node, ast.Name):
            value = names.get(node.id)
            is_class = isinstance(value, type) and issubclass(value, Basic)
            if not (is_class or isinstance(value, Basic | int | float) or any(value is f for f in functions)):
                raise ValueError(f"{node.id} in an expression")


def plain_eval(code: str, *namespaces: Any) -> Any:
    """`eval` of what has no names in it.

    Raises:
        ValueError: it has.
    """
    _check(code, {})
    return eval(code, {"__builtins__": {}})


@contextmanager
def mathematics_alone() -> Iterator[None]:
    """sympy's parser, which evaluates what it has read, refuses all but mathematics meanwhile."""
    from sympy.parsing import sympy_parser  # here, as above

    rewrite = sympy_parser.stringify_expr

    def checked(text: str, local_dict: dict, global_dict: dict, transformations: Any) -> str:
        code = rewrite(text, local_dict, global_dict, transformations)
        _check(code, global_dict | local_dict)
        return code

    with replaced(sympy_parser, "stringify_expr", checked):
        yield
