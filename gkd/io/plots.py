"""Pictures that appear whole or not at all."""

import os
from typing import Any

from gkd.io.files import written_aside


def new_figure(columns: int, width: float) -> tuple[Any, list[Any]]:
    """A matplotlib figure that needs no display, with `columns` panels side by side; width in inches."""
    from matplotlib.figure import Figure  # here, since importing it takes a while and few commands draw

    figure = Figure(figsize=(width, 4), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Saves aside, then renames."""
    with written_aside(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
