"""The teacher's completions on disk, so that `seq_kd` generates one for each prompt, and none in a later epoch or run.

One SQLite file: its transactions leave no half-written entry behind a crash, and several ranks may use it at a time.
"""

import hashlib
import json
import logging
import os
import sqlite3
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from gkd.io.files import put_aside, read_json, write_json, written_aside

logger = logging.getLogger(__name__)
_NOTE = "teacher_text.json"  # in a checkpoint


def _fits(key: bytes, data: bytes, checksum: int | None) -> bool:
    """None: an entry of an older version, which is not checked."""
    return checksum is None or (isinstance(data, bytes) and zlib.crc32(key + data) == checksum)


class TextCache:
    """Completions by prompt, of one teacher with one sampling configuration.

    An entry notes its run and step. On resume, entries newer than the checkpoint are deleted, so the same batches are
    regenerated: a killed run may have written them for some ranks and not for others. An entry whose checksum is wrong is
    dropped with a warning and generated anew; entries of older versions have no checksum and are not checked.

    Text that could not be written again the same, a server's, is kept: `keeps_all`.

    A file that can't be read or written costs time and no result: the run goes on without it, after one warning.

    Args:
        folder: of `completions.sqlite`; runs that share it share their text.
        fingerprint: of teacher and sampling, see `writer_fingerprint`.
        vocab_size: an entry with a larger id is damaged.
        keeps_all: a resumed run deletes nothing; prompts are UTF-8 of JSON, in whatever order its objects have their keys.

    Attributes:
        run: the id of the run that writes, see `gkd.runs.folder.run_id`.
    """

    def __init__(self, folder: str | Path, fingerprint: bytes, vocab_size: int = 2**31, keeps_all: bool = False):
        self.path = Path(folder) / "completions.sqlite"
        self.fingerprint, self.vocab_size, self.keeps_all = fingerprint, vocab_size, keeps_all
        self.run, self.works, self._warned_of_damage = "", True, False
        self._connection: sqlite3.Connection | None = None
        self._held: dict[bytes, list[int]] = {}  # by key, for this process alone

    def key_of(self, prompt: list[int]) -> bytes:
        """The primary key of a prompt, with this teacher and sampling."""
        if self.keeps_all:
            asked = json.dumps(json.loads(bytes(prompt)), sort_keys=True)
            return hashlib.sha256(self.fingerprint + asked.encode()).digest()
        return hashlib.sha256(self.fingerprint + np.asarray(prompt, np.int32).tobytes()).digest()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Another rank holds the file for milliseconds at a time; a minute is for slow network disks.
            self._connection = sqlite3.connect(self.path, timeout=60)
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS texts "
                "(prompt BLOB PRIMARY KEY, tokens BLOB, run TEXT, step INTEGER, rank INTEGER, checksum INTEGER) "
                "WITHOUT ROWID"
            )
            try:  # a file of an older version lacks this column
                self._connection.execute("ALTER TABLE texts ADD COLUMN checksum INTEGER")
            except sqlite3.OperationalError as error:
                if "duplicate column" not in str(error):
                    raise
        return self._connection

    def _give_up(self, error: Exception) -> None:
        self.works = False
        logger.warning("%s: %s. The run goes on; the teacher's text is generated anew.", self.path, error)

    def take_from(self, folder: str | Path) -> None:
        """Starts from a copy of the cache in `folder`, if there is one and this cache is still empty."""
        source = Path(folder) / self.path.name
        if os.path.isfile(source) and not os.path.exists(self.path):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # By SQLite and not as a file: it rolls back a transaction that a killed run left unfinished.
                with (
                    written_aside(self.path) as temporary,
                    closing(sqlite3.connect(source)) as original,
                    closing(sqlite3.connect(temporary)) as copy,
                ):
                    original.backup(copy)
            except (sqlite3.Error, OSError) as error:
                logger.warning("%s: %s. The teacher's text is generated anew.", source, error)

    def check(self) -> None:
        """Drops damaged entries, and puts a file aside that is no database. One process calls it before others open it."""
        if not self.path.is_file():
            return
        try:
            rows = self._open().execute("SELECT prompt, tokens, checksum FROM texts")
            self._drop([key for key, data, checksum in rows if not _fits(key, data, checksum)])
        except (sqlite3.Error, OSError) as error:
            if type(error) is not sqlite3.DatabaseError:  # its subclasses are about locks, permissions and disks
                self._give_up(error)
                return
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            put_aside(self.path, str(error), "The teacher's text is generated anew.")
            for ending in ("-journal", "-wal", "-shm"):
                self.path.with_name(f"{self.path.name}{ending}").unlink(missing_ok=True)

    def lookup(self, prompts: list[list[int]]) -> list[list[int] | None]:
        """The completion of each prompt, or None."""
        keys = [self.key_of(prompt) for prompt in prompts]
        entries = [self._row("SELECT tokens, checksum FROM texts WHERE prompt = ?", key) for key in keys]
        if not self.works:
            return [self._held.get(key) for key in keys]
        texts = [
            self._text(key, *entry) if entry else self._held.get(key) for key, entry in zip(keys, entries, strict=True)
        ]
        self._drop([key for key, entry, text in zip(keys, entries, texts, strict=True) if entry and text is None])
        return texts

    def _row(self, query: str, value: Any) -> tuple | None:
        """The first row of a query; None if there is none, or the file can't be read."""
        try:
            return self._open().execute(query, (value,)).fetchone() if self.works else None
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)
            return None

    def _text(self, key: bytes, data: bytes, checksum: int | None) -> list[int] | None:
        """The tokens of an entry; None if it is damaged."""
        if not isinstance(data, bytes) or not data or len(data) % 4 or not _fits(key, data, checksum):
            return None
        tokens = np.frombuffer(data, np.int32)
        return tokens.tolist() if tokens.min() >= 0 and tokens.max() < self.vocab_size else None

    def _drop(self, damaged: list[bytes]) -> None:
        if not damaged:
            return
        if not self._warned_of_damage:
            logger.warning(
                f"{self.path}: {len(damaged)} damaged texts, which the teacher writes anew: not the same again, so the "
                "run differs from one with a whole file."
            )
        self._warned_of_damage = True
        self._change("DELETE FROM texts WHERE prompt = ?", [(key,) for key in damaged])

    def written(self, run: str) -> dict[str, int] | None:
        """How many entries `run` has written, and the sum of their checksums; None if the file can't be read."""
        if not self.path.is_file():
            return {"entries": 0, "checksum": 0}
        row = self._row("SELECT COUNT(*), COALESCE(SUM(checksum), 0) FROM texts WHERE run = ?", run)
        return row and dict(zip(("entries", "checksum"), row, strict=True))

    def note(self, checkpoint: Path) -> None:
        """Notes in a checkpoint what this run has written so far."""
        if (written := self.written(self.run)) is not None:
            write_json(checkpoint / _NOTE, {"run": self.run, **written})

    def compare(self, checkpoint: Path) -> None:
        """Warns if text that a run had written by this checkpoint is missing."""
        if not (checkpoint / _NOTE).is_file():
            return
        noted = read_json(checkpoint / _NOTE)
        written = self.written(noted["run"])
        if written is not None and self.keeps_all and written["entries"] >= noted["entries"]:
            return  # with what was written after the checkpoint
        if written is not None and written != {name: noted[name] for name in written}:
            logger.warning(
                f"{self.path} has {written['entries']} of the {noted['entries']} texts that the teacher had written by "
                f"{checkpoint.name}. What is missing it writes anew, not the same again: the run differs from one that "
                "was not interrupted."
            )

    def store(self, prompts: list[list[int]], completions: list[list[int]], step: int = 0, rank: int = 0) -> None:
        """Keeps the completions that `rank` wrote at `step`, all or none; an existing entry stays."""
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            key, data = self.key_of(prompt), np.asarray(completion, np.int32).tobytes()
            rows.append((key, data, self.run, step, rank, zlib.crc32(key + data)))
        # Of two ranks with equal prompts at the same step, the lower one wins, whichever comes first.
        self._change(
            "INSERT INTO texts (prompt, tokens, run, step, rank, checksum) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (prompt) DO UPDATE SET tokens = excluded.tokens, checksum = excluded.checksum, "
            "rank = excluded.rank WHERE run = excluded.run AND step = excluded.step AND rank > excluded.rank",
            rows,
        )

    def hold(self, prompt: list[int], completion: list[int]) -> None:
        """Has `lookup` return a completion in this process; it is not written."""
        self._held[self.key_of(prompt)] = completion

    def forget_since(self, step: int, run: str) -> None:
        """Deletes the entries that `run` wrote after `step` steps, unless all are kept."""
        if self.path.is_file() and not self.keeps_all:
            self._change("DELETE FROM texts WHERE run = ? AND step >= ?", [(run, step)])

    def _change(self, statement: str, rows: list[tuple]) -> None:
        if not self.works:
            return
        try:
            with self._open() as connection:
                connection.executemany(statement, rows)
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)
