"""The optimizer steps of a run: the source of each one's text, how it becomes batches, and what a checkpoint keeps of it.

The draws are counter-based: a function of (seed, step) alone, without generator state. So every rank draws the same, a
resumed run draws what the interrupted one would have drawn, and no other use of random numbers shifts the draws.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig

from gkd.data.batch import (
    IGNORE,
    Batch,
    Source,
    by_shares,
    keys_of,
    stack_prompts,
    text_keys,
    training_batch,
    unpadded_rows,
)
from gkd.generation.sampling import SOURCE_STREAM
from gkd.rollout.cache import TextCache
from gkd.rollout.dealing import dealt_rows
from gkd.rollout.grouping import StepRows, cut, share
from gkd.teachers.base import Teacher


def draw_source(seed: int, step: int, lmbda: float, seq_kd: bool) -> Source:
    """Algorithm 1 of arXiv 2306.13649, once per optimizer step: on-policy with probability `lmbda`.

    Deviation from the paper (4): the draw is per optimizer step and not per micro-batch, so that all micro-batches of
    a step can be generated at once.
    """
    uniform = np.random.Generator(np.random.Philox(key=[seed, SOURCE_STREAM], counter=step)).random()  # in [0, 1)
    if uniform < lmbda:
        return Source.ON_POLICY
    return Source.TEACHER if seq_kd else Source.DATASET


@dataclass
class StepText:
    """The micro-batches of one optimizer step on one rank. Each has rows of like length, and their number follows."""

    source: Source
    batches: list[Batch]
    completions: int
    truncated: torch.Tensor | int  # completions that reached a length limit
    empty: torch.Tensor | int = 0  # completions that are only a stop token
    losses: list[torch.Tensor] = field(default_factory=list)  # of the micro-batches trained on so far

    @property
    def rows(self) -> int:
        return sum(batch.rows for batch in self.batches)


@dataclass
class PlannedStep:
    """A step whose rows are read and whose source is drawn."""

    source: Source
    collated: list[dict[str, torch.Tensor]]  # its micro-batches' rows, from `gkd.data.batch.GKDCollator`
    # The teacher's text of each prompt that the cache has.
    cached: list[list[int] | None] = field(default_factory=list)
    text: StepText | None = None  # set when it is written


def _file(checkpoint: str | Path, rank: int) -> Path:
    return Path(checkpoint, "pending_text", f"rank-{rank}.safetensors")


def save_pending(checkpoint: str | Path, pending: dict[int, StepText], rank: int, ranks: int) -> None:
    """Writes one rank's text, by step, on which a resumed run trains too; no file if there is none."""
    if not pending:
        return
    tensors, steps = {}, {}
    for step, text in pending.items():
        for index, batch in enumerate(text.batches):
            tensors |= {f"{step}.{index}.{name}": batch[name].contiguous() for name in batch}
        counts = {"completions": text.completions, "truncated": int(text.truncated), "empty": int(text.empty)}
        steps[str(step)] = {"source": text.source.label, "batches": len(text.batches), **counts}
    path = _file(checkpoint, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"steps": json.dumps(steps), "ranks": str(ranks)})


def load_pending(checkpoint: str | Path, rank: int, ranks: int, device: torch.device) -> dict[int, StepText]:
    """What `save_pending` wrote for this rank; nothing if it was written by another number of ranks."""
    path = _file(checkpoint, rank)
    if not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if int(metadata["ranks"]) != ranks:
            return {}
        columns: dict[tuple[str, str], dict[str, torch.Tensor]] = defaultdict(dict)  # by step and micro-batch
        for name in file.keys():  # noqa: SIM118
            step, index, column = name.split(".")
            columns[step, index][column] = file.get_tensor(name)
    pending = {}
    for step, noted in json.loads(metadata["steps"]).items():
        batches = [Batch(**columns[step, str(index)]).to(device) for index in range(noted.pop("batches"))]
        pending[int(step)] = StepText(Source[noted.pop("source").upper()], batches, **noted)
    return pending


@dataclass
class TextWriter:
    """Writes the text of steps with the student, the teacher (through `cache`, if given) or the dataset's answers.

    `server`, if given, writes the teacher's text in its place.
    """

    accelerator: Accelerator
    write_student: Callable[..., tuple[torch.Tensor, torch.Tensor]]  # as `Teacher.write`
    teacher: Teacher
    configs: dict[Source, GenerationConfig]  # how student and teacher sample
    show_phase: Callable[[str], None]  # takes the present phase, for the progress bar
    pad: int
    cache: TextCache | None
    keep_mask: bool  # batches keep their `attention_mask`, which a router's load-balancing loss needs
    max_length: int | None  # of prompt and completion together
    packs: Callable[[], bool]  # whether rows of a micro-batch need no padding, see gkd.models.packing
    overhead: int  # the fixed cost of a micro-batch, in tokens of padding that take as long
    most_rows: Callable[[], int | None]  # of a micro-batch, where more did not fit in memory
    server: Any = None  # a `gkd.teachers.servers.text_server.TextServer`, which needs packages that others do not

    def write(self, planned: list[PlannedStep], seed: int, step: int, limit: int | None = None) -> list[StepText]:
        """The text of several steps of one source, generated together.

        Args:
            seed: of the sampling noise.
            step: optimizer steps done so far, for the cache's entries.
            limit: tokens that a completion may have, in place of --max_new_tokens.
        """
        source, steps = planned[0].source, [plan.collated for plan in planned]
        if source is Source.DATASET:
            return [self._from_dataset(batches) for batches in steps]
        self.show_phase(f"generating ({'student' if source is Source.ON_POLICY else 'teacher'})")
        every = [batch for batches in steps for batch in batches]

        def stacked(teacher: bool = False) -> list[torch.Tensor]:
            return [tensor.to(self.accelerator.device) for tensor in stack_prompts(every, self.pad, teacher)]

        prompts, prompt_mask = read = stacked()
        if source is Source.TEACHER and any("teacher_prompts" in batch for batch in every):
            read = stacked(teacher=True)
        cached = [text for plan in planned for text in plan.cached]
        config = self.configs[source]
        if limit is not None:
            config = copy(config)
            config.max_new_tokens = limit
        shares = None
        if source is Source.TEACHER and "teacher_shares" in every[0]:
            shares = torch.cat([batch["teacher_shares"] for batch in every])
        if source is Source.TEACHER and self.server is not None:
            completions, mask = self._padded(self._served(every, cached, config, step))
        else:
            completions, mask = self._complete(*read, source, config, seed, cached, step, shares)
        stops = torch.tensor(config.eos_token_id or [], dtype=torch.long, device=mask.device)
        stopped = (torch.isin(completions, stops) & mask.bool()).any(1)  # (B,)
        cut = ~stopped & mask.bool().any(1)  # (B,) reached the length limit
        empty = ~cut & (mask.sum(1) <= 1)  # (B,) only a stop token, or from a server nothing
        sizes = [len(batch["prompts"]) for batch in every]
        longest = min(prompts.shape[1] + config.max_new_tokens, self.max_length or sys.maxsize)
        parts = zip(*(t.split(sizes) for t in (prompts, prompt_mask, completions, mask, cut, empty)), strict=True)
        texts = []
        for batches in steps:
            parts_of_step = [next(parts) for _ in batches]
            texts_of_step = [training_batch(*part[:4], pad=self.pad) for part in parts_of_step]
            for batch, rows in zip(texts_of_step, batches, strict=True):
                self.teacher.read(batch, rows)
            texts_of_step = self._cut(texts_of_step, longest)
            counts = (sum(part[at].sum() for part in parts_of_step) for at in (4, 5))
            texts.append(StepText(source, texts_of_step, sum(len(part[0]) for part in parts_of_step), *counts))
        return texts

    def _from_dataset(self, collated: list[dict[str, torch.Tensor]]) -> StepText:
        answered = sum(int((rows["labels"] != IGNORE).any(1).sum()) for rows in collated)
        cut = sum(int(rows["answer_cut"].sum()) for rows in collated if "answer_cut" in rows)
        batches = [Batch.of(rows) for rows in collated]  # still on the CPU, where counting costs no wait
        for batch, rows in zip(batches, collated, strict=True):
            self.teacher.read(batch, rows)
        batches = [batch.to(self.accelerator.device) for batch in self._cut(batches)]
        return StepText(Source.DATASET, batches, answered, cut)

    def _cut(self, batches: list[Batch], longest: int = 0, deal: bool = True) -> list[Batch]:
        """The rows of a step on this rank, in micro-batches of rows of like length.

        None has more tokens than one of `batches` could have had: a text may have `longest`, or what the longest has.

        Args:
            deal: rows may first move between ranks, for about the same number of tokens on each.
        """
        if self.keep_mask:  # the balance of a router depends on which rows are together
            return batches
        rows = own = StepRows(batches, self.pad)
        longest = max(longest, *own.lengths)
        if deal and self.accelerator.num_processes > 1:
            rows, longest = dealt_rows(own, self.accelerator, longest)
        most = max(batch.rows for batch in batches) * longest
        divide = partial(share if self.packs() else partial(cut, overhead=self.overhead), most_rows=self.most_rows())
        groups = divide(rows.lengths, most)
        if self.accelerator.num_processes > 1:  # ranks train in step
            sizes = torch.tensor([[len(groups), len(rows.lengths)]], device=self.accelerator.device)
            counts, rows_of_ranks = self.accelerator.gather(sizes).T.tolist()
            if max(counts) > min(rows_of_ranks) and rows is not own:
                return self._cut(batches, longest, deal=False)
            if max(counts) > min(rows_of_ranks):  # as they are
                ends = np.cumsum([batch.rows for batch in batches])[:-1]
                groups = [part.tolist() for part in np.split(np.arange(len(rows.lengths)), ends)]
            elif max(counts) > len(groups):
                groups = divide(rows.lengths, most, at_least=max(counts))
        return rows.batches(groups)

    def _complete(
        self,
        prompts,
        prompt_mask,
        source: Source,
        config: GenerationConfig,
        seed: int,
        cached: list[list[int] | None],
        step: int,
        shares: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Completions (B, T) and mask of left-padded prompts (B, P); `cached` has the cache's of each, or None.

        `shares`: (B, K) of several teachers.
        """
        if source is Source.ON_POLICY:
            return self.write_student(prompts, prompt_mask, config, seed)
        if self.cache is None:
            return self.teacher.write(prompts, prompt_mask, config, seed, **by_shares(shares))
        rows, texts = text_keys(prompts, prompt_mask, shares), list(cached)
        first = {tuple(row): i for i, row in reversed([*enumerate(rows)])}  # prompts that are equal get one text
        missing = [i for i, text in enumerate(texts) if text is None and first[tuple(rows[i])] == i]
        if self.teacher.sharded:  # ranks run the same forwards: all generate everything, or none generates
            total = self.accelerator.reduce(torch.tensor(len(missing), device=prompts.device), reduction="sum")
            missing = list(range(len(rows))) if total > 0 else []
        if missing:
            at = torch.tensor(missing, device=prompts.device)
            more = by_shares(shares, missing)
            answers = self.teacher.write(prompts[at], prompt_mask[at], config, seed, **more)
            written = unpadded_rows(*answers)
            self.cache.store([rows[i] for i in missing], written, step, self.accelerator.process_index)
            for i, text in zip(missing, written, strict=True):
                texts[i] = texts[i] or text
        return self._padded([texts[first[tuple(row)]] for row in rows])

    def _served(
        self, every: list[dict[str, torch.Tensor]], cached: list[list[int] | None], config: GenerationConfig, step: int
    ) -> list[list[int]]:
        """The ids of the server's text for each row; none where it wrote none. An answer is kept as it comes."""
        keys = [bytes(key) for batch in every for key in keys_of(batch)]
        texts = {key: bytes(text) for key, text in zip(keys, cached, strict=False) if text is not None}
        missing = [key for key in dict.fromkeys(keys) if key not in texts]
        for key, text in self.server.texts(missing, config):
            texts[key] = text
            if self.cache is not None and self.server.keeps(text):
                self.cache.store([[*key]], [[*text]], step, self.accelerator.process_index)
            elif self.cache is not None:
                self.cache.hold([*key], [*text])
        return [self.server.tokens(key, texts[key], config.max_new_tokens) for key in keys]

    def _padded(self, texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Completions (B, T) and their mask."""
        width, device = max(map(len, texts)), self.accelerator.device
        padded = [text + [self.pad] * (width - len(text)) for text in texts]
        ids = torch.tensor(padded, dtype=torch.long, device=device)
        lengths = torch.tensor([len(text) for text in texts], device=device)
        return ids, (torch.arange(width, device=device) < lengths[:, None]).long()
