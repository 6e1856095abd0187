"""Links and names in a folder that somebody may have sent: nothing outside of it is written, moved or deleted by them."""

import os
import shutil
from pathlib import Path

# What commands write in a run's folder other than by a rename, which replaces a link itself.
_WRITTEN = """_unfinished _teacher_text _teacher_text/* _run.* _skipped_steps* evaluation evaluation/* evaluation/rows/*
    report_figures report_figures/*""".split()
_BY_TRAINING = ["README.md", "runs", "runs/*"]  # by TRL and by trackers


def refuse_links(folder: str | os.PathLike, trains: bool = False) -> None:
    """Looks at what an evaluation and a report write to in `folder`, and, if it `trains`, a run.

    Raises:
        ValueError: one of them is a link, so that what is written or deleted there would be somewhere else.
    """
    for pattern in _WRITTEN + _BY_TRAINING * trains:
        for path in sorted(Path(folder).glob(pattern)):
            if path.is_symlink():
                raise ValueError(
                    f"{path} is a link to {os.readlink(path)}; what is written there would change files outside of "
                    f"{folder}. Delete the link, or put its files in its place."
                )


def remove(path: str | os.PathLike) -> None:
    """Deletes a folder with all that is in it; of a link the link alone."""
    if os.path.islink(path):
        os.unlink(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def is_plain_name(name: object) -> bool:
    """Whether a name that a file holds is that of something right in its folder, on any system."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
        return False
    return len(name.encode("utf-8", "surrogatepass")) <= 255  # bytes, what file systems take
