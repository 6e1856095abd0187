"""A run's output folder: locked, so that no run overwrites another, and checked, so that none resumes from damage."""

import logging
import os
import socket
from pathlib import Path
from secrets import token_hex

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from gkd.io.files import refuse_links, write_whole
from gkd.io.paths import checkpoints_in
from gkd.io.pickles import check_checkpoint
from gkd.runs.checkpoints import damage, last_whole, step_of

logger = logging.getLogger(__name__)

_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
_FINISHED = ("trainer_state.json", *_WEIGHTS)
LOCK, OWNER, ID = "_run.lock", "_run.owner", "_run.id"  # --push_to_hub leaves out what begins with _
_HELD: dict[Path, FileLock] = {}


def has_model(folder: str | Path) -> bool:
    """Whether the folder holds a whole model or an adapter."""
    return any((Path(folder) / name).is_file() for name in _WEIGHTS)


def lock(output_dir: str) -> None:
    """Locks the folder until this process ends, however it ends: the system then releases the lock.

    Raises:
        ValueError: another process writes there.
    """
    folder = Path(output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / OWNER
    try:
        _HELD.setdefault(folder, FileLock(folder / LOCK)).acquire(timeout=0)
    except Timeout:
        who = owner.read_text(encoding="utf-8").strip() if owner.is_file() else "another process"
        raise ValueError(
            f"{output_dir}: another run writes there ({who}). Wait for it, or choose another --output_dir."
        ) from None
    except OSError as error:  # some network disks can't lock
        logger.warning("%s can't be locked (%s): make sure that no other run writes there.", output_dir, error)
        return
    owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")


def claim(output_dir: str, resume: str | None, main_process: bool, writes: bool = True) -> str | None:
    """Locks the folder (if the process `writes`) and finds the checkpoint to resume from, which all ranks get.

    Raises:
        ValueError: as `lock` and `resume_point`, on the main process; a checkpoint that would run code, on all.
    """
    checkpoint = None
    if main_process:
        refuse_links(output_dir, trains=True)
        if writes:
            lock(output_dir)
        checkpoint = resume_point(output_dir, resume)
    (checkpoint,) = broadcast_object_list([checkpoint])
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    return checkpoint


def leave_behind(output_dir: str, checkpoint: str | None) -> None:
    """Renames checkpoints newer than the one resumed from."""
    if checkpoint is None or Path(checkpoint).resolve().parent != Path(output_dir).resolve():
        return
    step = step_of(checkpoint)
    for later in map(Path, checkpoints_in(output_dir)):
        if int(later.name.rpartition("-")[2]) > step and later.resolve() != Path(checkpoint).resolve():
            kept = later.with_name(f"_left-{later.name}")
            if os.path.lexists(kept):  # from an earlier resume
                kept = kept.with_name(f"{kept.name}-{token_hex(4)}")
            later.rename(kept)
            logger.warning("Going back to step %d: %s is now %s, delete it if nobody needs it.", step, later, kept)


def run_id(output_dir: str | Path, make: bool = True) -> str | None:
    """The run's id, which stays when its folder is moved. If there is none, `make` decides: a new one, or None."""
    path = Path(output_dir, ID)
    if not path.is_file() or not path.stat().st_size:
        if not make:
            return None
        write_whole(path, token_hex(8))
    return path.read_text(encoding="utf-8")


def resume_point(output_dir: str, resume: str | None) -> str | None:
    """The checkpoint that a run starts from, or None for a new run. Damaged checkpoints are reported and skipped.

    Args:
        resume: `--resume_from_checkpoint`: a checkpoint's folder; `auto` for the last undamaged one in `output_dir`,
            or a new run if there is none; `True` for the last undamaged one, which must exist.

    Raises:
        ValueError: `output_dir` holds another run and `resume` doesn't ask to continue it; or `resume` names no
            undamaged checkpoint.
    """
    folder = Path(output_dir)
    last = next(iter(checkpoints_in(output_dir)), None)
    present = [Path(last).name] if last else [name for name in _FINISHED if (folder / name).exists()]
    go_on = "Go on with it by --resume_from_checkpoint auto, or choose" if last else "Choose"
    refusal = f"{output_dir} already holds a run ({', '.join(present[:1])}). {go_on} another --output_dir."
    wish = "false" if resume is None else resume.lower()
    if wish in ("auto", "true", "false"):
        undamaged, problems = (None, []) if wish == "false" else last_whole(output_dir)
        if undamaged is None and problems:
            raise ValueError(f"{' '.join(problems)} No other is whole: choose another --output_dir.")
        if undamaged is None and wish == "true":
            raise ValueError(f"--resume_from_checkpoint True: there is no checkpoint in {output_dir}.")
        if undamaged is None and present:
            raise ValueError(refusal)
        for problem in problems:
            logger.warning("%s The run goes on from %s.", problem, undamaged)
        return undamaged
    if present and Path(resume).resolve().parent != folder.resolve():
        raise ValueError(f"{refusal} ({resume} is a checkpoint of another run.)")
    if not (Path(resume) / "trainer_state.json").is_file():
        raise ValueError(f"--resume_from_checkpoint {resume}: not a checkpoint (no trainer_state.json there).")
    if problem := damage(resume):
        raise ValueError(f"--resume_from_checkpoint {resume}: it is damaged: {problem}.")
    return resume
