"""Why a faster way gave way to a slower one, for the line that says so."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, which may have none."""
    return (str(error).splitlines() or [""])[0]
