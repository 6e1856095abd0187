"""Checkpoints that are complete or absent: written aside, sealed with checksums, renamed, and verified before use."""

import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gkd.io.errors import first_line
from gkd.io.files import publish, read_json, remove, write_json
from gkd.io.paths import CHECKPOINT_NAME, checkpoints_in
from gkd.io.terminal import visible

SEAL = "checksums.json"
STATE = "trainer_state.json"
UNFINISHED = "_unfinished"  # in the run's folder: checkpoints and models that are being written
_BLOCK = 2**24


def _checksum(path: Path) -> dict[str, int]:
    crc = size = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SEAL)


def seal(folder: Path) -> None:
    """Records the size and CRC-32 of each file in `folder`."""
    files = _files(folder)
    with ThreadPoolExecutor() as pool:  # zlib releases the GIL
        sums = dict(zip((str(f.relative_to(folder)) for f in files), pool.map(_checksum, files), strict=True))
    write_json(folder / SEAL, sums)


def damage(folder: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint, or None. One without a seal (by TRL, say) only needs a readable state."""
    folder = Path(folder)
    try:
        step_of(folder)
        if not (folder / SEAL).is_file():
            return None
        sums = read_json(folder / SEAL)
        if outside := [name for name in sums if Path(name).is_absolute() or ".." in Path(name).parts]:
            return f"{SEAL} names {visible(outside[0])}, which is no file of it"
        if missing := [name for name in sums if not (folder / name).is_file()]:
            return f"{visible(missing[0])} is missing"
        for name, expected in sums.items():  # sizes first, since they take no reading
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{visible(name)} has {size:,} of {expected['bytes']:,} bytes"
        with ThreadPoolExecutor() as pool:
            actual = pool.map(_checksum, [folder / name for name in sums])
            return next((f"{visible(n)} has changed" for n, a in zip(sums, actual, strict=True) if a != sums[n]), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # the last three: JSON of another form
        return first_line(error)


def rotate(output_dir: str | os.PathLike, limit: int | None, keep: Iterable[str | os.PathLike]) -> None:
    """Deletes the oldest checkpoints by step until `limit` are left (None or 0: no limit), but none of `keep`."""
    present = checkpoints_in(output_dir)[::-1]
    kept = {Path(checkpoint).resolve() for checkpoint in keep}
    excess = max(len(present) - limit, 0) if limit else 0
    for checkpoint in [checkpoint for checkpoint in present if Path(checkpoint).resolve() not in kept][:excess]:
        remove(checkpoint)


def step_of(checkpoint: str | os.PathLike) -> int:
    """The optimizer step of a checkpoint, from its state.

    Raises:
        OSError, ValueError: its state can't be read, has no step, or another one than the folder's name.
    """
    step = state_of(checkpoint).get("global_step")
    if type(step) is not int or step < 0:
        raise ValueError(f"{STATE} tells no global_step")
    named = CHECKPOINT_NAME.fullmatch(Path(checkpoint).name)
    if named and step != int(named[1]):
        raise ValueError(f"{STATE} tells step {step}, and the folder's name {named[1]}")
    return step


def state_of(folder: str | os.PathLike) -> dict[str, Any]:
    """The trainer's state in the folder of a run or checkpoint. Raises OSError or ValueError if it can't be read."""
    state = read_json(Path(folder, STATE))
    if not isinstance(state, dict):
        raise ValueError(f"{Path(folder, STATE)} is damaged: it is no object")
    return state


def last_whole(output_dir: str | os.PathLike) -> tuple[str | None, list[str]]:
    """The latest undamaged checkpoint, or None, and a line about each later one that is damaged."""
    problems = []
    for checkpoint in checkpoints_in(output_dir):
        if (problem := damage(checkpoint)) is None:
            return checkpoint, problems
        problems.append(visible(f"{checkpoint} is damaged: {problem}."))
    return None, problems


def move_into(aside: Path, folder: Path) -> None:
    """Moves each file of `aside` to its place in `folder`, replacing an existing one, and deletes `aside`."""
    for path in _files(aside):
        place = folder / path.relative_to(aside)
        for parent in list(path.relative_to(aside).parents)[-2::-1]:  # without `folder` itself, outermost first
            if (folder / parent).is_symlink():
                remove(folder / parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        publish(path, place)
    remove(aside)
