"""Text from outside (rows, templates, models, records, names of files) made safe to show. Imports no library."""

import html
import re

# What moves the cursor, recolours or clears a screen (C0 but newline and tab, DEL, C1), what reorders the text beside it
# (bidi embeddings, overrides and isolates), and lone surrogates, which no terminal's encoding has.
_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)")

# Markdown does not read an underscore inside a word.
_MARKDOWN = re.compile(r"([\\`*~\[\]|]|(?<![^\W_])_|_(?![^\W_]))")


def visible(text: object) -> str:
    """The text with each character that a terminal would act on escaped: `\\x1b`, `\\u202e`."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def in_markdown(text: object) -> str:
    """A text as one line of Markdown that shows it literally: HTML and Markdown in it are escaped."""
    return "<br>".join(_MARKDOWN.sub(r"\\\1", html.escape(visible(text), quote=False)).splitlines())


def code_in_markdown(text: object) -> str:
    """A text as code, safe in a cell of a Markdown table."""
    text = str(text)
    # Nothing can be escaped between backticks.
    return f"<code>{in_markdown(text)}</code>" if re.search("[`|\r\n]", text) else f"`{visible(text)}`"
