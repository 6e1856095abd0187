"""rich's console, made safe for text from outside. Not in gkd.io.terminal, since rich takes a while to import."""

import sys
from collections.abc import Iterable

import rich.console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from gkd.io.terminal import visible


def printable(text: str) -> Text:
    """A text for rich that shows what it holds: no markup is read, and no character moves the cursor."""
    return Text(visible(text))


class Console(rich.console.Console):
    """rich's console, which lets no text act on the terminal, even without `printable`."""

    def render_str(self, text: str, **options) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable, options=None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def print_table(table: Table) -> None:
    """A log has no width, of which rich would think that it is 80; the table takes no more than it needs."""
    Console(width=None if sys.stdout.isatty() else 200).print(table)
