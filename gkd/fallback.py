"""What an error says, in a line: why a faster way gave way to a slower one, or why nothing can be done."""

from gkd.terminal import visible


def first_line(error: BaseException) -> str:
    """The first line of an error's message, which may have none, safe to print: it may quote a file."""
    return visible((str(error).splitlines() or [""])[0])


def one_line(error: BaseException) -> str:
    """An error's message, or its class where it has none, in one line that is safe to print."""
    return visible(" ".join(str(error).split()) or type(error).__name__)
