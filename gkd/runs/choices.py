"""What a run chose by itself, such as how many rows fit in memory: told once, kept, and used again on resume."""

import json
import logging
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from gkd.io.errors import first_line
from gkd.io.files import put_aside, write_json

logger = logging.getLogger(__name__)

NAME = "choices.json"  # in a run's folder, and in its checkpoints
GENERATION_ROWS, MICRO_ROWS = "generation_rows", "micro_rows"  # at most so many generate or train together
SPARE_MEMORY = "spare_memory"  # 0: training has none for what only speed needs

Values = dict[str, int]


class Choices:
    """Values by name: whole numbers from 0 on.

    A run starts with those in its folder, and resumes with those of the checkpoint: the same values compute the same bits.
    Ranks share them; one that lowers a value alone is ahead until the next `save`.

    Args:
        folder: of the run, from which all ranks read together; without one nothing is read or written.
    """

    def __init__(self, folder: str | Path | None = None):
        self._path = None if folder is None else Path(folder, NAME)
        self._values: Values = {}
        self._at_most: Values = {}  # of attempts that stopped for it: a checkpoint from before may say more
        if self._path is not None:
            if PartialState().is_main_process:
                self._values, self._at_most, problem = _read(self._path)
                if problem is not None:
                    put_aside(self._path, problem, "What it held is chosen again.")
            self._values, self._at_most = broadcast_object_list([self._values, self._at_most])
        self._written = self._content()

    def get(self, name: str) -> int | None:
        """The value of a choice; None if nothing was chosen."""
        return self._values.get(name)

    def lower(self, name: str, value: int, message: str, stops: bool = False) -> None:
        """Makes a number smaller, on this rank alone.

        Args:
            message: told now, unless the run `stops`.
            stops: the run ends for it. The next start takes no more than this, whatever its checkpoint says.
        """
        self._values[name] = value
        if stops:
            self._at_most[name] = value
        else:
            logger.warning(message if self._path is None else f"{message} {self._path} keeps it.")
        if stops or PartialState().num_processes == 1:  # otherwise `save` writes what the ranks agree on
            self._write()

    def resume(self, checkpoint: str | Path) -> None:
        """Takes a checkpoint's choices in place of the folder's. All ranks call it.

        Raises:
            ValueError: they are damaged.
        """
        values, problem, path = {}, None, Path(checkpoint, NAME)
        if PartialState().is_main_process:
            values, _, problem = _read(path)
        values, problem = broadcast_object_list([values, problem])
        if problem is not None:
            raise ValueError(f"{path} is damaged: {problem}. Resume from another checkpoint.")
        self._values = values | {name: min(most, values.get(name, most)) for name, most in self._at_most.items()}
        if PartialState().is_main_process:
            self._write()

    def save(self, checkpoint: Path, writes: bool) -> None:
        """Has the ranks take the least of their values from here on, and a rank that `writes` keep them in a checkpoint.

        All ranks call it.
        """
        of_ranks = gather_object([self._values])
        names = sorted(set().union(*of_ranks))
        self._values = {name: min(values[name] for values in of_ranks if name in values) for name in names}
        if PartialState().is_main_process:
            self._write()
        if writes and self._values:
            write_json(checkpoint / NAME, self._content())

    def _content(self) -> dict[str, Values]:
        return {"chosen": dict(self._values), "at_most": dict(self._at_most)}

    def _write(self) -> None:
        if self._path is not None and self._content() != self._written:
            self._written = self._content()
            write_json(self._path, self._written)


def _read(path: Path) -> tuple[Values, Values, str | None]:
    """What was chosen, the limits of attempts that stopped, and what is wrong with the file, if it is damaged."""
    if not path.is_file():
        return {}, {}, None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return {}, {}, first_line(error)
    parts = [content.get(part) for part in ("chosen", "at_most")] if isinstance(content, dict) else [None]
    for part in parts:
        if not isinstance(part, dict) or any(type(value) is not int or value < 0 for value in part.values()):
            return {}, {}, "it holds no choices"
    return parts[0], parts[1], None
