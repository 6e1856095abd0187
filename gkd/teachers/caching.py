"""One pass of the teacher over encoded rows: it writes their text, where asked to, and tells its top k of each token."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from gkd.config.caching import CacheArguments
from gkd.data.batch import IGNORE, Batch, GKDCollator, training_batch
from gkd.generation.generator import new_generator
from gkd.generation.sampling import sampling_seed, training_config
from gkd.losses.topk import TopK
from gkd.models.pairing import Pairing
from gkd.teachers.base import Teacher
from gkd.teachers.cache import with_teacher
from gkd.teachers.placed import place_teacher


class TeacherPass:
    """The teacher in its place, ready to read rows.

    Args:
        pairing: ids that the student does not have are never written and have no mass.
        args: what is kept, who writes the text and how, and how many rows go through it together.
    """

    def __init__(self, teacher: nn.Module | Teacher, accelerator: Accelerator, pairing: Pairing, args: CacheArguments):
        self.accelerator, self.pad = accelerator, pairing.tokenizer.pad_token_id
        self.teacher = place_teacher(teacher, accelerator, args, self.pad)
        self.teacher.decode_by(new_generator(args))
        self.stop_ids, self.vocab_size = pairing.stop_ids, pairing.vocab_size
        self.k, self.loss_temperature = args.top_k, args.loss_temperature
        self.writes, self.batch_size, self.seed = args.seq_kd, args.batch_size, args.seed
        unshared = range(self.vocab_size, pairing.sizes[1])
        self.config = training_config(args.max_new_tokens, args.temperature, self.pad, self.stop_ids, unshared)
        self.collate = GKDCollator(self.pad, self.teacher.columns)

    @torch.no_grad()
    def __call__(
        self, rows: list[dict[str, Any]], shard: int, tell: Callable[[str, int], None] = lambda phase, rows: None
    ) -> list[dict[str, Any]]:
        """Encoded rows -> rows as a shard of the cache holds them (`with_teacher`), in the same order.

        A function of the rows and (seed, shard) alone, so that it does not matter which process makes a shard, or when.

        Args:
            tell: called with the phase, and how many rows are done since the last call.
        """
        # Rows of similar length go together: less padding. The longest come first, so too large a batch fails at once.
        column = "prompt_ids" if self.writes else "input_ids"
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][column]))
        result: list[dict[str, Any]] = [{}] * len(rows)
        for start in range(0, len(rows), self.batch_size):
            indices = order[start : start + self.batch_size]
            part = [rows[i] for i in indices]
            if self.writes:
                tell("generating (teacher)", 0)
                step = shard * 2**20 + start
                part = self._written(part, sampling_seed(self.seed, step, rank=0))
            tell("scoring", 0)
            for i, row in zip(indices, self._scored(part), strict=True):
                result[i] = row
            tell("scoring", len(indices))
        return result

    def _written(self, rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
        """The rows with the teacher's answers."""
        batch = self.collate(rows)
        prompts = batch["prompts"], batch["prompt_attention_mask"]
        completions = self.teacher.write(*prompts, self.config, seed)
        text = training_batch(*prompts, *completions, self.pad)
        ids, kept, labels = (text[n] for n in ("input_ids", "attention_mask", "labels"))
        written = []
        for row, tokens, here, targets in zip(rows, ids, kept.bool(), labels, strict=True):
            answer = targets[targets != IGNORE]
            cut = not bool(torch.isin(answer, torch.tensor(self.stop_ids)).any())
            written.append(
                row | {"input_ids": tokens[here].tolist(), "labels": targets[here].tolist(), "answer_cut": cut}
            )
        return written

    def _scored(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows with what the teacher says of their scored tokens."""
        collated = self.collate(rows)
        batch = Batch.of(collated)
        counts = (batch.labels[:, 1:] != IGNORE).sum(1).tolist()
        batch.attention_mask = None  # all padding stands on the right, where no token that counts can see it
        self.teacher.read(batch, collated)
        device = self.accelerator.device
        options = self.vocab_size, self.k, self.loss_temperature, device
        with self.teacher.target(batch.to(device)) as target:
            topk = TopK.of_target(target, len(batch.scored), *options).to("cpu")
        parts = zip(*(tensor.split(counts) for tensor in topk.tensors), strict=True)
        return [with_teacher(row, TopK(*part)) for row, part in zip(rows, parts, strict=True)]
