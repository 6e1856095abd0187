"""One pass of the teacher over encoded rows: writes their text if asked to, and computes what is kept of each token."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from gkd.config.caching import CacheArguments
from gkd.data.batch import IGNORE, Batch, GKDCollator, by_shares, prompts_of, training_batch
from gkd.generation.generator import new_generator
from gkd.generation.sampling import sampling_config, sampling_seed
from gkd.losses.topk import TopK
from gkd.models.heads import LogitHead
from gkd.models.pairing import Pairing
from gkd.teachers.base import Teacher
from gkd.teachers.cache_files import with_teacher
from gkd.teachers.placed import place_teacher


class TeacherPass:
    """The teacher on its device. Ids that the student lacks are never written, and have no probability.

    Raises ValueError for a teacher whose hidden states or head --keep hidden can't store.

    Attributes:
        head: the teacher's, for --keep hidden; else None.
    """

    head: LogitHead | None = None

    def __init__(self, teacher: nn.Module | Teacher, accelerator: Accelerator, pairing: Pairing, args: CacheArguments):
        self.args, self.vocab_size, self.device = args, pairing.vocab_size, accelerator.device
        self.any_student = args.cross_tokenizer != "off"
        self.pad, self.stop_ids = pairing.tokenizer.pad_token_id, torch.tensor(pairing.stop_ids)
        self.teacher = place_teacher(teacher, accelerator, args, self.pad)
        if args.keep == "hidden":
            with self.teacher.head() as self.head:
                self.head.check_plain()
        self.teacher.decode_by(new_generator(args))
        self.config = sampling_config(pairing, pairing.sizes[1], args.max_new_tokens, args.temperature)
        self.collate = GKDCollator(self.pad, self.teacher.columns)

    @torch.no_grad()
    def __call__(
        self, rows: list[dict[str, Any]], shard: int, tell: Callable[[str, int], None] = lambda phase, rows: None
    ) -> list[dict[str, Any]]:
        """Encoded rows -> rows as a shard of the cache holds them (`with_teacher`), in the same order.

        A function of the rows and (seed, shard) alone, so that any process can compute any shard. `tell` is called with
        the phase, and the number of rows that are done since the last call.
        """
        # Rows of similar length share a batch: less padding. The longest come first: too large a batch fails at once.
        column = "prompt_ids" if self.args.seq_kd else "input_ids"
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][column]))
        result: list[dict[str, Any]] = [{}] * len(rows)
        for start in range(0, len(rows), self.args.batch_size):
            indices = order[start : start + self.args.batch_size]
            part = [rows[i] for i in indices]
            if self.args.seq_kd:
                tell("generating (teacher)", 0)
                part = self._written(part, sampling_seed(self.args.seed, shard * 2**20 + start, rank=0))
            tell("scoring", 0)
            for i, row in zip(indices, self._scored(part), strict=True):
                result[i] = row
            tell("scoring", len(indices))
        return result

    def _written(self, rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
        """The rows with the teacher's answers."""
        collated = self.collate(rows)
        more = by_shares(collated.get("teacher_shares"))
        answers = self.teacher.write(*prompts_of(collated, teacher=True), self.config, seed, **more)
        batch = training_batch(*prompts_of(collated), *answers, self.pad)
        written = []
        for row, ids, keep, labels in zip(
            rows, batch.input_ids, batch.attention_mask.bool(), batch.labels, strict=True
        ):
            cut = not bool(torch.isin(labels[labels != IGNORE], self.stop_ids).any())
            written.append(row | {"input_ids": ids[keep].tolist(), "labels": labels[keep].tolist(), "answer_cut": cut})
        return written

    def _scored(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows with what is kept of the teacher at their scored tokens."""
        collated = self.collate(rows)
        batch = Batch.of(collated)
        counts = (batch.labels[:, 1:] != IGNORE).sum(1).tolist()
        batch.attention_mask = None  # all padding stands on the right, where no token that counts can see it
        self.teacher.read(batch, collated)
        options = self.vocab_size, self.args.top_k, self.args.loss_temperature, self.device
        with self.teacher.target(batch.to(self.device)) as target:
            if self.head is not None:
                parts = target.hidden.cpu().split(counts)
            else:
                next_ids = batch.next_ids.to(self.device) if self.any_student else None
                topk = TopK.of_target(target, len(batch.scored), *options, next_ids).to("cpu")
                columns = (*topk.tensors, *([topk.following] if self.any_student else []))
                parts = map(TopK, *(tensor.split(counts) for tensor in columns))
        return [with_teacher(row, part) for row, part in zip(rows, parts, strict=True)]
