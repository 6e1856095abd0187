"""Files and folders that are complete or absent: written aside, flushed to disk, then renamed. Links are refused."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

logger = logging.getLogger(__name__)

# What commands write to directly in a run's folder. Other files are renamed into place, which replaces a link itself.
_WRITTEN = """_unfinished _teacher_text _teacher_text/* _run.* _skipped_steps* evaluation evaluation/* evaluation/rows/*
    report_figures report_figures/*""".split()
_BY_TRAINING = ["README.md", "runs", "runs/*"]  # written by TRL and by trackers


def _flush(path: str | os.PathLike) -> None:
    """Flushes a file to disk, or a folder's list of names where the system can: Windows and some network disks can't."""
    with suppress(OSError) if os.path.isdir(path) else nullcontext():
        descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def publish(temporary: str | os.PathLike, path: str | os.PathLike) -> None:
    """Flushes a finished file or folder to disk and renames it to `path`. A file replaces an older one."""
    for folder, _, names in os.walk(temporary):
        for name in names:
            _flush(Path(folder, name))
        _flush(folder)
    _flush(temporary)
    os.replace(temporary, path)
    _flush(Path(path).absolute().parent)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Adds the file's name to an OSError without one, such as a full disk's."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def written_aside(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside the file `path` to write to; it is renamed to `path` at the end.

    On any error, an interruption included, the temporary file is deleted. No other process uses its name.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{token_hex(4)}.partial")
    try:
        with naming(path):
            yield temporary
            publish(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Writes a text file, and its folder if need be. Half of a surrogate pair is escaped as in JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def appearing(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder, renamed to `folder` (absent or empty so far) at the end, or deleted on any error."""
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        aside = Path(scratch, folder.name)  # inside, since only its owner may read a temporary folder
        aside.mkdir()
        with naming(folder):
            yield aside
            if folder.is_dir():
                folder.rmdir()  # an empty one
            publish(aside, folder)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON that people can read too."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False))


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file. Raises ValueError, naming the file, if it holds no JSON or is nested too deeply."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def sha256_of(path: str | os.PathLike) -> str:
    """The checksum of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def put_aside(path: Path, problem: str, then: str) -> None:
    """Renames a damaged file to NAME.damaged, so that it can be looked at, and warns in one line."""
    aside = path.with_name(f"{path.name}.damaged")
    count = 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}.damaged-{count}")
    try:
        os.replace(path, aside)
        logger.warning("%s is damaged (%s) and is now %s. %s", path, problem, aside.name, then)
    except OSError as error:  # a folder that can only be read
        logger.warning("%s is damaged (%s) and stays there (%s). %s", path, problem, error, then)


def refuse_links(folder: str | os.PathLike, trains: bool = False) -> None:
    """Checks what an evaluation, a report and, with `trains`, a run write to in `folder`, which somebody may have sent.

    Raises:
        ValueError: one of them is a link, so writing or deleting there would change files elsewhere.
    """
    for pattern in _WRITTEN + _BY_TRAINING * trains:
        for path in sorted(Path(folder).glob(pattern)):
            if path.is_symlink():
                raise ValueError(
                    f"{path} is a link to {os.readlink(path)}; what is written there would change files outside of "
                    f"{folder}. Delete the link, or put its files in its place."
                )


def remove(path: str | os.PathLike) -> None:
    """Deletes a folder with its content; of a link, only the link."""
    if os.path.islink(path):
        os.unlink(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def is_plain_name(name: object) -> bool:
    """Whether a name that a file holds stays inside its folder, on any system, and is not too long."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
        return False
    return len(name.encode("utf-8", "surrogatepass")) <= 255  # bytes, what file systems take


def new_figure(columns: int, width: float) -> tuple[Any, list[Any]]:
    """A matplotlib figure that needs no display, with `columns` panels side by side; width in inches."""
    from matplotlib.figure import Figure  # here, since importing it takes a while and few commands draw

    figure = Figure(figsize=(width, 4), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Saves a PNG that is complete or absent."""
    with written_aside(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
