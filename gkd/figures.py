"""Pictures that appear whole or not at all."""

import os
from pathlib import Path
from secrets import token_hex
from typing import Any


def new_figure(columns: int, width: float) -> tuple[Any, list[Any]]:
    """A matplotlib figure that needs no display, with `columns` panels side by side; width in inches."""
    from matplotlib.figure import Figure  # here, since importing it takes a while and few commands draw

    figure = Figure(figsize=(width, 4), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Saves aside, then renames."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{token_hex(4)}.partial")
    try:
        figure.savefig(temporary, dpi=150, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
