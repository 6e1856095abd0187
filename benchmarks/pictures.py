"""Pictures of how a cost grows."""

from collections.abc import Sequence
from pathlib import Path

from gkd.io.files import new_figure, save_figure

Line = tuple[Sequence[float], Sequence[float]]  # x and y


def draw(panels: Sequence[tuple[str, str, dict[str, Line]]], path: Path) -> None:
    """Saves panels side by side, with logarithmic axes; a dashed line is proportional growth from a line's first point.

    Args:
        panels: the titles of x and y, and lines by their labels; those without a point are left out.
    """
    panels = [(x, y, {label: line for label, line in lines.items() if line[0]}) for x, y, lines in panels]
    panels = [panel for panel in panels if panel[2]]
    figure, axes = new_figure(max(1, len(panels)), width=4.5 * max(1, len(panels)))
    for panel, (x_title, y_title, lines) in zip(axes, panels, strict=False):
        for number, (label, (x, y)) in enumerate(lines.items()):
            panel.plot(x, y, "o-", color=f"C{number}", label=label)
            panel.plot(x, [y[0] * value / x[0] for value in x], "--", color=f"C{number}", alpha=0.4)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel(x_title)
        panel.set_ylabel(y_title)
        panel.legend()
        panel.grid(True, which="both", alpha=0.2)
    save_figure(figure, path)
