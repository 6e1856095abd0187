"""How a command ends: errors and signals are reported in one line, and half-written files are removed."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from safetensors import SafetensorError

from gkd.io.terminal import visible

SAME_COMMAND = "The same command goes on with it."
_TO_DO = {
    errno.ENOSPC: "Free some space.",
    errno.EDQUOT: "Free some of your quota.",
    errno.EFBIG: "Files may be no larger there: see ulimit -f.",
    errno.EACCES: "Whoever runs this needs to be allowed to write there.",
    errno.EROFS: "Choose a folder that can be written.",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunStopped(Exception):
    """Training can't go on; says why and what to do. No RuntimeError, since --auto_find_batch_size retries those."""


class _Ended(BaseException):
    """A signal, by its number, asks the process to end. A BaseException, so no error handler catches it."""


def is_of_writing(error: BaseException) -> bool:
    """Whether a file could not be written (or read). torch and tokenizers raise error types of their own for that."""
    if isinstance(error, RuntimeError):
        return any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "iostream error"))
    of_tokenizers = type(error) is Exception and "(os error " in str(error)
    return of_tokenizers or isinstance(error, OSError | SafetensorError)


def why_not_written(error: BaseException) -> str:
    """The error's first line, which names the file where that is known, and what to do about it."""
    return f"{first_line(error).rstrip('.')}. {_TO_DO.get(getattr(error, 'errno', None), '')}".strip()


def hang_up() -> None:
    """Redirects stdout and stderr to the null device where their terminal is gone, since writing to it raises."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), descriptor)


@contextmanager
def one_line_errors(program: str, go_on: str | Callable[[], str] = "") -> Iterator[None]:
    """Ends a command with one line instead of a traceback on RunStopped, a failed write or a signal.

    The line begins with `program`, and ends with `go_on`, what to do next, after a signal or a failed write. The exit code
    after a signal is 128 plus its number. Files that are being written aside are removed.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        program += f", rank {os.environ.get('RANK')}"

    def next_step() -> str:
        return f" {go_on() if callable(go_on) else go_on}".rstrip()

    with _raised_signals():
        try:
            yield
        except RunStopped as error:
            sys.exit(visible(f"{program}: {error}"))
        except (KeyboardInterrupt, _Ended) as error:
            number = error.args[0] if isinstance(error, _Ended) else signal.SIGINT
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            with suppress(OSError):  # the terminal may be gone
                print(f"\n{program}: stopped by {name}.{next_step()}", file=sys.stderr, flush=True)
            sys.exit(128 + number)
        except Exception as error:
            if not is_of_writing(error):
                raise
            sys.exit(visible(f"{program}: {why_not_written(error)}{next_step()}"))


@contextmanager
def refusals(program: str, *more: type[Exception]) -> Iterator[None]:
    """Ends a command with one line where a ValueError, OSError, ImportError or one of `more` refuses its input."""
    try:
        yield
    except (ValueError, OSError, ImportError, *more) as error:
        if getattr(error, "errno", None) in _FULL:
            raise  # to `one_line_errors`
        sys.exit(f"{program}: {one_line(error)}")


@contextmanager
def _raised_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP raise instead of killing the process, unless they are handled or ignored already."""
    caught = []
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        caught = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, _frame) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        if number != signal.SIGTERM:
            hang_up()
        raise _Ended(number)

    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, "" if it has none. Safe to print, since it may quote a file."""
    return visible((str(error).splitlines() or [""])[0])


def one_line(error: BaseException) -> str:
    """An error's message on one line, or its class where there is none. Safe to print."""
    return visible(" ".join(str(error).split()) or type(error).__name__)
