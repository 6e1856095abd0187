"""The teacher's completions on disk, so that `seq_kd` generates each prompt's once: not again in a later epoch or run.

One SQLite file: its transactions leave no half-written entry behind a crash, and several ranks may use it at a time.
"""

import hashlib
import json
import logging
import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from gkd.adapters import base_parameters

logger = logging.getLogger(__name__)

_SAMPLED_WEIGHTS = 64  # of each parameter


@torch.no_grad()
def writer_fingerprint(model: nn.Module, config: GenerationConfig, without_adapter: bool = False) -> bytes:
    """Identifies who writes and how: a sample of each weight, wherever the model was loaded from, and the sampling.

    `without_adapter`: the base of a PeftModel writes, which is known as if it had never had an adapter.
    """
    digest = hashlib.sha256()
    samples = []
    for name, parameter in base_parameters(model) if without_adapter else model.named_parameters():
        flat = parameter.detach().flatten()
        samples.append(flat[:: max(1, flat.numel() // _SAMPLED_WEIGHTS)][:_SAMPLED_WEIGHTS].float())
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
    digest.update(torch.cat(samples).cpu().numpy().tobytes())
    sampling = {
        name: getattr(config, name) for name in ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p")
    }
    sampling |= {"stop": config.eos_token_id, "suppressed": len(config.suppress_tokens or [])}
    digest.update(json.dumps(sampling, sort_keys=True).encode())
    return digest.digest()


class TextCache:
    """Completions by prompt, of one teacher and one way to sample.

    Args:
        folder: where `completions.sqlite` is or will be; runs that share it share their text.
        fingerprint: see `writer_fingerprint`.
        run: the id of the run that writes, see `gkd.run_folder.run_id`; may be set later.

    An entry notes at which step of which run it was written: a run that goes back to a checkpoint forgets what it wrote
    after it, and so writes the same again, in the same company. Text that a killed run wrote in part would be found by
    some ranks and not by others.

    A file that can't be read or written (a full disk, a damaged file) costs time and no result: it is told once, and
    the run goes on without.
    """

    def __init__(self, folder: str | Path, fingerprint: bytes, run: str = ""):
        self.path = Path(folder) / "completions.sqlite"
        self.fingerprint, self.run = fingerprint, run
        self._connection: sqlite3.Connection | None = None
        self._works = True

    def _key(self, prompt: list[int]) -> bytes:
        return hashlib.sha256(self.fingerprint + np.asarray(prompt, np.int32).tobytes()).digest()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Another rank holds the file for milliseconds at a time; a minute is for slow network disks.
            self._connection = sqlite3.connect(self.path, timeout=60)
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS texts "
                "(prompt BLOB PRIMARY KEY, tokens BLOB, run TEXT, step INTEGER, rank INTEGER) WITHOUT ROWID"
            )
        return self._connection

    def _give_up(self, error: Exception) -> None:
        self._works = False
        logger.warning("%s: %s. The run goes on; the teacher's text is generated anew.", self.path, error)

    def take_from(self, folder: str | Path) -> None:
        """Starts from a copy of the cache in `folder`, if there is one and this cache is still empty."""
        source = Path(folder) / self.path.name
        if os.path.isfile(source) and not os.path.exists(self.path):
            temporary = self.path.with_suffix(f".{os.getpid()}.partial")
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Not as a file: a run that was killed may have left half of a transaction, which SQLite undoes.
                with closing(sqlite3.connect(source)) as theirs, closing(sqlite3.connect(temporary)) as copy:
                    theirs.backup(copy)
                temporary.replace(self.path)
            except (sqlite3.Error, OSError) as error:
                logger.warning("%s: %s. The teacher's text is generated anew.", source, error)
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)

    def lookup(self, prompts: list[list[int]]) -> list[list[int] | None]:
        """The completion of each prompt, or None."""
        found: list[list[int] | None] = [None] * len(prompts)
        if self._works:
            try:
                for i, prompt in enumerate(prompts):
                    query = "SELECT tokens FROM texts WHERE prompt = ?"
                    row = self._open().execute(query, (self._key(prompt),)).fetchone()
                    if row is not None:
                        found[i] = np.frombuffer(row[0], np.int32).tolist()
            except (sqlite3.Error, OSError) as error:
                self._give_up(error)
                return [None] * len(prompts)
        return found

    def store(self, prompts: list[list[int]], completions: list[list[int]], step: int = 0, rank: int = 0) -> None:
        """Keeps the completions, all or none. One that is there already stays, whichever rank comes first.

        Args:
            step, rank: of the run, when and by whom they were written.
        """
        rows = [
            (self._key(p), np.asarray(tokens, np.int32).tobytes(), self.run, step, rank)
            for p, tokens in zip(prompts, completions, strict=True)
        ]
        # Of two ranks that write for equal prompts at the same step, the lower one counts, which is no race.
        self._change(
            "INSERT INTO texts VALUES (?, ?, ?, ?, ?) ON CONFLICT (prompt) DO UPDATE SET tokens = excluded.tokens, "
            "rank = excluded.rank WHERE run = excluded.run AND step = excluded.step AND rank > excluded.rank",
            rows,
        )

    def forget_since(self, step: int, run: str) -> None:
        """Drops what `run` wrote after it had done `step` steps."""
        if self.path.is_file():
            self._change("DELETE FROM texts WHERE run = ? AND step >= ?", [(run, step)])

    def _change(self, statement: str, rows: list[tuple]) -> None:
        if not self._works:
            return
        try:
            with self._open() as connection:
                connection.executemany(statement, rows)
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)
