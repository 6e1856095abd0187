"""Text from outside (rows, templates, models, records, file names) made safe to display."""

import html
import re
import sys
from collections.abc import Iterable

import rich.console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# What moves the cursor, recolours or clears a screen (C0 but newline and tab, DEL, C1), what reorders the text beside it
# (bidi embeddings, overrides and isolates), and lone surrogates, which no terminal's encoding has.
_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)")

# Markdown does not read an underscore inside a word.
_MARKDOWN = re.compile(r"([\\`*~\[\]|]|(?<![^\W_])_|_(?![^\W_]))")


def visible(text: object) -> str:
    """The text with each character that a terminal would act on escaped: `\\x1b`, `\\u202e`."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def printable(text: str) -> Text:
    """A text for rich that is shown literally: no markup is read, and no character moves the cursor."""
    return Text(visible(text))


def in_markdown(text: object) -> str:
    """A text as one line of Markdown that shows it literally: HTML and Markdown in it are escaped."""
    return "<br>".join(_MARKDOWN.sub(r"\\\1", html.escape(visible(text), quote=False)).splitlines())


def code_in_markdown(text: object) -> str:
    """A text as code, safe in a cell of a Markdown table."""
    text = str(text)
    # Nothing can be escaped between backticks.
    return f"<code>{in_markdown(text)}</code>" if re.search("[`|\r\n]", text) else f"`{visible(text)}`"


class Console(rich.console.Console):
    """rich's console, but no text acts on the terminal, even where a caller forgets `printable`."""

    def render_str(self, text: str, **options) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable, options=None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def print_table(table: Table) -> None:
    """Prints a table no wider than needed. rich assumes 80 columns for a log file, which has no width."""
    Console(width=None if sys.stdout.isatty() else 200).print(table)
