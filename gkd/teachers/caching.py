"""One pass of the teacher over encoded rows: it writes their text, where asked to, and tells its top k of each token."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from gkd.config.caching import CacheArguments
from gkd.data.batch import IGNORE, GKDCollator, scored_positions, training_batch
from gkd.generation.generator import new_generator
from gkd.generation.modes import complete
from gkd.generation.sampling import sampling_seed, training_config
from gkd.losses.topk import TopK
from gkd.models.heads import LogitHead, hidden_at_scored, last_hidden_states
from gkd.models.pairing import Pairing
from gkd.teachers.cache import with_teacher


class TeacherPass:
    """The teacher, on its device, ready to read rows.

    Args:
        pairing: ids that the student does not have are never written and have no mass.
        args: what is kept, who writes the text and how, and how many rows go through it together.
    """

    def __init__(self, teacher: nn.Module, accelerator: Accelerator, pairing: Pairing, args: CacheArguments):
        self.teacher, self.accelerator = teacher, accelerator
        self.pad, self.stop_ids, self.vocab_size = pairing.tokenizer.pad_token_id, pairing.stop_ids, pairing.vocab_size
        self.k, self.loss_temperature = args.top_k, args.loss_temperature
        self.writes, self.batch_size, self.seed = args.seq_kd, args.batch_size, args.seed
        size = teacher.config.get_text_config().vocab_size
        unshared = range(self.vocab_size, size)
        self.config = training_config(args.max_new_tokens, args.temperature, self.pad, self.stop_ids, unshared)
        self.head = LogitHead.of(teacher)
        self.collate = GKDCollator(self.pad)
        self.generator = new_generator(args)

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
        made: list[dict[str, Any]] = [{}] * len(rows)
        for start in range(0, len(rows), self.batch_size):
            mine = order[start : start + self.batch_size]
            part = [rows[i] for i in mine]
            if self.writes:
                tell("generating (teacher)", 0)
                step = shard * 2**20 + start
                part = self._written(part, sampling_seed(self.seed, step, rank=0))
            tell("scoring", 0)
            for i, row in zip(mine, self._scored(part), strict=True):
                made[i] = row
            tell("scoring", len(mine))
        return made

    def _written(self, rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
        """The rows with the teacher's answers."""
        batch = self.collate(rows)
        prompts, device = (batch["prompts"], batch["prompt_attention_mask"]), self.accelerator.device
        completions = complete(
            self.teacher, self.accelerator, self.generator, *prompts, self.config, seed, device=device
        )
        text = training_batch(*prompts, *completions, self.pad)
        ids, kept, labels = (text[n] for n in ("input_ids", "attention_mask", "labels"))
        made = []
        for row, tokens, here, targets in zip(rows, ids, kept.bool(), labels, strict=True):
            answer = targets[targets != IGNORE]
            cut = not bool(torch.isin(answer, torch.tensor(self.stop_ids)).any())
            made.append(
                row | {"input_ids": tokens[here].tolist(), "labels": targets[here].tolist(), "answer_cut": cut}
            )
        return made

    def _scored(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows with what the teacher says of their scored tokens."""
        batch = self.collate(rows)
        scored = scored_positions(batch["labels"])
        counts = (batch["labels"][:, 1:] != IGNORE).sum(1).tolist()
        ids = batch["input_ids"].to(self.accelerator.device)
        # No mask: all padding stands on the right, where no token that counts can see it.
        hidden = hidden_at_scored(partial(last_hidden_states, self.teacher), ids, None, scored.to(ids.device))
        known = TopK.of_hidden(hidden, self.head, self.vocab_size, self.k, self.loss_temperature).to("cpu")
        parts = zip(*(tensor.split(counts) for tensor in known.tensors), strict=True)
        return [with_teacher(row, TopK(*part)) for row, part in zip(rows, parts, strict=True)]
