"""Why a faster way gave way to a slower one, for the line that says so."""

from gkd.terminal import visible


def first_line(error: BaseException) -> str:
    """The first line of an error's message, which may have none, safe to print: it may quote a file."""
    return visible((str(error).splitlines() or [""])[0])
