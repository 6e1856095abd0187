"""Opens the inputs that a command names: files, folders, zip archives, a pipe, hub ids."""

import contextlib
import os
import shutil
import stat
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from gkd.convert.files import KINDS, HubRows, RowFile, ending_of
from gkd.convert.packed import ARCHIVE
from gkd.data.rows import DataError
from gkd.io.files import naming


class UsageError(DataError):
    """The command names an input or an output that can't be used."""


def open_input(
    name: str, encoding: str | None, outputs: list[Path], passed_over: list[str], stack: contextlib.ExitStack
) -> list[RowFile | HubRows]:
    """A file, all files of known types in a folder or a zip archive, `-` for a pipe, or a hub id.

    Args:
        outputs: files that no input may be, and no input folder may hold.
        passed_over: receives a line for each file in a folder or an archive that is not read, and why.
        stack: keeps a pipe's content on disk until it closes, since files are read more than once.

    Raises:
        FileNotFoundError: there is nothing of this name.
        UsageError: an input that is an output too, or no regular file.
        DataError: a folder without data, a hub dataset that can't be read, an unknown type or encoding.
    """
    path = Path(name)
    if name == "-":
        if sys.stdin is None:
            raise UsageError("-: there is no standard input.")
        spool = stack.enter_context(tempfile.NamedTemporaryFile(prefix="gkd-stdin-"))  # noqa: SIM115 — the stack closes it
        with naming(spool.name):
            shutil.copyfileobj(sys.stdin.buffer, spool)
            spool.flush()
        return _opened(Path(spool.name), "<stdin>", encoding, outputs, passed_over)
    if path.is_dir():
        for output in outputs:
            if path.resolve() in output.resolve().parents:
                raise UsageError(
                    f"{output} lies in the input folder {name}: the next run would read it as data. Write it somewhere "
                    "else."
                )
        start = len(passed_over)
        parts = list(_files_in(path, passed_over))
        if not parts:
            others = f" Not read: {'; '.join(passed_over[start : start + 5])}." if passed_over[start:] else ""
            raise DataError(f"{name}: no data file in this folder ({', '.join(KINDS)}).{others}")
        return [file for part in parts for file in _opened(part, str(part), encoding, outputs, passed_over)]
    if path.is_file():
        return _opened(path, str(path), encoding, outputs, passed_over)
    if path.exists():
        raise UsageError(
            f"{name} is no regular file, and files are read more than once. Pipe it in: "
            f"cat {name} | python convert_data.py - ..."
        )
    if path.suffix or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such file or folder.")
    return [HubRows(name)]


def _files_in(folder: Path, passed_over: list[str]) -> Iterator[Path]:
    """The data files in a folder and in those below it, in order; links are followed, each folder is read once."""
    paths, seen = [], set()

    def unreadable(error: OSError) -> None:
        passed_over.append(f"{error.filename}: {error.strerror}")

    for root, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            passed_over.append(f"{root}: a link to a folder that is read already")
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        passed_over += [f"{Path(root, name)}: hidden" for name in sorted(folders + names) if name.startswith(".")]
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(root, name) for name in names if not name.startswith(".")]
    for path in sorted(paths):
        try:
            regular = stat.S_ISREG(path.stat().st_mode)
        except OSError as error:
            passed_over.append(f"{path}: {'a broken link' if path.is_symlink() else error.strerror}")
            continue
        if not regular:
            passed_over.append(f"{path}: no regular file")
        elif ending_of(path.name) in KINDS or path.suffix.lower() == ".zip":
            yield path
        else:
            passed_over.append(f"{path}: another kind of file")


def _opened(path: Path, name: str, encoding: str | None, outputs: list[Path], passed_over: list[str]) -> list[RowFile]:
    """The file, or the files in it if it is a zip archive."""
    for output in outputs:
        if output.exists() and output.samefile(path):
            raise UsageError(f"{output} is an input too ({path}): it would be overwritten. Write to another file.")
    with path.open("rb") as file:
        if file.read(len(ARCHIVE)) != ARCHIVE:
            return [RowFile(path, encoding, name)]
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise DataError(f"{name}: broken zip file: {error}") from None
    opened = []
    for member in members:
        where = f"{name}/{member.filename}"
        if member.is_dir():
            continue
        if member.flag_bits & 1:
            raise DataError(f"{where} is encrypted; unpack the archive first.")
        if any(part.startswith((".", "__MACOSX")) for part in Path(member.filename).parts):
            passed_over.append(f"{where}: hidden")
        elif ending_of(member.filename) in KINDS:
            opened.append(RowFile(path, encoding, where, member))
        else:
            passed_over.append(f"{where}: another kind of file")
    if not opened:
        raise DataError(f"{name}: no data file in this archive ({', '.join(KINDS)}).")
    return opened
