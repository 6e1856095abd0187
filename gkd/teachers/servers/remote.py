"""A teacher behind `gkd serve`: its hidden states come over the network, its head once, so that every β is exact.

The head is kept in memory, on the device of training; no file of it stays.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig

from gkd.config.teacher import TeacherArguments
from gkd.data.batch import Batch
from gkd.generation.generator import Generator
from gkd.io.terminal import visible
from gkd.losses.targets import HiddenTarget, Target
from gkd.models.heads import LogitHead
from gkd.models.pairing import Side
from gkd.models.tokenizers import described_tokenizer
from gkd.teachers.servers import wire
from gkd.teachers.servers.client import OVERHEAD, Promised, ServedTeacher, Servers

TOKEN = "GKD_TEACHER_TOKEN"
_LARGEST_TOKENIZER = 2**28  # bytes

# What /identity tells that is used here.
_ABOUT = {"name": str, "parameters": int, "bytes": int, "vocabulary": int, "width": int, "window": int | None}
_ABOUT |= {"stop_ids": list, "weights": str, "head": dict, "writes": bool, "packs": bool}


def _about(content: bytes) -> dict[str, Any]:
    about = json.loads(content)
    if not isinstance(about, dict):
        raise ValueError("its identity is no object")
    for name, kind in _ABOUT.items():
        if not isinstance(about.get(name), kind):
            raise ValueError(f"its identity has no proper {name}")
    if not isinstance(about["head"].get("sha256"), str) or not isinstance(about["head"].get("bytes"), int):
        raise ValueError("its identity has no proper head")
    return about


class RemoteTeacher(ServedTeacher):
    """The teacher that `--teacher_url` names.

    Raises RunStopped if no server answers, one refuses the token, or they have different weights.
    """

    gives_hidden = True
    _head: LogitHead | None = None
    _rows: int | None = None  # that write together, as the flags of this command have it

    def __init__(self, args: TeacherArguments):
        token = wire.check_token(TOKEN, os.environ.get(TOKEN, ""))
        self._servers = Servers(args.teacher_urls, args.teacher_timeout, token)
        every = self._servers.identities(_about)
        about = self._about = every[0]
        self.size = about["parameters"], about["bytes"]
        self.head_size = about["head"]["bytes"], about["head"]["bytes"] // max(about["vocabulary"], 1)
        self.writes = about["writes"]
        self.packs = all(server["packs"] for server in every)
        self.name = f"{visible(about['name'])[:80]} (weights {visible(about['weights'])[:16]})"
        self.fingerprints = {"teacher_url": f"weights {about['weights']}"}

    def side(self, student: Side, args: Any) -> Side:
        """Raises ValueError for a tokenizer that can't be read."""
        described = self._servers.ask("/tokenizer", None, _LARGEST_TOKENIZER, json.loads)
        tokenizer = None
        if described is not None:
            try:
                tokenizer = described_tokenizer(described)
            except ValueError as error:
                raise ValueError(f"--teacher_url: the server's tokenizer can't be read: {error}") from None
        stops = (SimpleNamespace(eos_token_id=self._about["stop_ids"]),)
        return Side(tokenizer, self._about["vocabulary"], stops, window=self._about["window"])

    # ------------------------------------------------------------------ hidden states

    def _ask_for(self, batch: Batch) -> Promised:
        return Promised(self._servers.later(*self._request(batch)).result)

    def target(self, batch: Batch) -> AbstractContextManager[Target]:
        return nullcontext(HiddenTarget(self._output(batch), self._head_on(batch.labels.device)))

    def _request(self, batch: Batch) -> tuple[Any, ...]:
        """The arguments of `Servers.ask` for a batch's hidden states (N, Ht), on the CPU."""
        shape = len(batch.teacher_inputs[2]), self._about["width"]

        def read(body: bytes) -> torch.Tensor:
            hidden = wire.unpack(body)[0].get("hidden")
            if hidden is None or hidden.shape != shape or not hidden.is_floating_point():
                raise ValueError(f"it sent no hidden states of the shape {list(shape)}")
            return hidden.clone()  # memory of its own, whose alignment products on a CPU depend on

        limit = shape[0] * shape[1] * 8 + OVERHEAD
        return "/hidden", wire.pack(wire.of_batch(batch)), limit, read

    @contextmanager
    def head(self) -> Iterator[LogitHead]:
        yield self._head_on(torch.device("cpu") if self._head is None else self._head.head.weight.device)

    def _head_on(self, device: torch.device) -> LogitHead:
        if self._head is None:
            with tempfile.TemporaryDirectory(prefix="gkd-head-") as folder:
                path = Path(folder, "head.safetensors")
                self._servers.ask("/head", None, self._about["head"]["bytes"], self._is_head, partial(_save, path))
                self._head = LogitHead.load(path, device)
        if self._head.head.weight.device != device:
            self._head = replace(self._head, head=self._head.head.to(device))
        return self._head

    def _is_head(self, digest: str) -> None:
        if digest != self._about["head"]["sha256"]:
            raise ValueError("its head has another checksum than it told")

    # ------------------------------------------------------------------ text

    def decode_by(self, generator: Generator) -> None:
        self._rows = getattr(generator, "batch_size", None)

    def write(self, prompts, mask, config, seed) -> tuple[torch.Tensor, torch.Tensor]:
        settings = {"sampling": wire.of_sampling(config), "seed": seed, "rows": self._rows}
        body = wire.pack({"prompts": prompts, "mask": mask}, **settings)
        longest, size = config.max_new_tokens, self._about["vocabulary"]

        def read(body: bytes) -> tuple[torch.Tensor, torch.Tensor]:
            tensors, _ = wire.unpack(body)
            ids, kept = (tensors.get(name, torch.empty(0)) for name in ("ids", "mask"))
            good = (
                ids.ndim == 2 and len(ids) == len(prompts) and 0 < ids.shape[1] <= longest and kept.shape == ids.shape
            )
            if not good or {ids.dtype, kept.dtype} != {torch.int64} or not bool(((ids >= 0) & (ids < size)).all()):
                raise ValueError("it sent no completions of these prompts")
            return ids, kept

        ids, kept = self._servers.ask("/generate", body, 16 * len(prompts) * longest + OVERHEAD, read)
        return ids.to(prompts.device), kept.to(prompts.device)

    def identity(self, config: GenerationConfig) -> bytes | None:
        def read(body: bytes) -> bytes:
            return bytes.fromhex(wire.unpack(body)[1]["fingerprint"])

        return self._servers.ask("/fingerprint", wire.pack({}, sampling=wire.of_sampling(config)), OVERHEAD, read)


def _save(path: Path, parts: Iterator[bytes]) -> str:
    """Writes a file, and returns its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
    return digest.hexdigest()
