"""The text of optimizer steps: from prompts and a source to batches ready for the loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import GenerationConfig

from gkd.data.batch import IGNORE, Batch, Source, stack_prompts, training_batch, unpadded_rows
from gkd.rollout.cache import TextCache
from gkd.rollout.steps import PlannedStep, StepText
from gkd.teachers.base import Teacher

# (left-padded prompts (B, P), their mask, configuration, seed) -> completions (B, T) and their mask
Write = Callable[[torch.Tensor, torch.Tensor, GenerationConfig, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class TextWriter:
    """Writes the text of steps with the student, the teacher (through `cache`, if given) or the dataset's answers."""

    accelerator: Accelerator
    write_student: Write
    teacher: Teacher
    configs: dict[Source, GenerationConfig]  # how student and teacher sample
    show_phase: Callable[[str], None]  # takes the present phase, for the progress bar
    pad: int
    cache: TextCache | None
    keep_mask: bool  # batches keep their `attention_mask`, which a router's load-balancing loss needs

    def look_up(self, collated: list[dict[str, torch.Tensor]]) -> list[list[int] | None]:
        """The teacher's text for each prompt of these collated batches, as far as the cache has it."""
        prompts = [row for rows in collated for row in unpadded_rows(rows["prompts"], rows["prompt_attention_mask"])]
        return [None] * len(prompts) if self.cache is None else self.cache.lookup(prompts)

    def write(self, planned: list[PlannedStep], seed: int, step: int) -> list[StepText]:
        """The text of several steps of one source, generated together.

        Args:
            seed: of the sampling noise.
            step: optimizer steps done so far, for the cache's entries.
        """
        source, steps = planned[0].source, [plan.collated for plan in planned]
        if source is Source.DATASET:
            return [self._from_dataset(batches) for batches in steps]
        self.show_phase(f"generating ({'student' if source is Source.ON_POLICY else 'teacher'})")
        stacked = stack_prompts([batch for batches in steps for batch in batches], self.pad)
        prompts, prompt_mask = (tensor.to(self.accelerator.device) for tensor in stacked)
        cached = [text for plan in planned for text in plan.cached]
        completions, mask = self._complete(prompts, prompt_mask, source, seed, cached, step)
        stops = torch.tensor(self.configs[source].eos_token_id or [], dtype=torch.long, device=mask.device)
        cut = ~(torch.isin(completions, stops) & mask.bool()).any(1)  # (B,) reached the length limit
        empty = ~cut & (mask.sum(1) == 1)  # (B,) only a stop token
        sizes = [len(batch["prompts"]) for batches in steps for batch in batches]
        parts = zip(*(t.split(sizes) for t in (prompts, prompt_mask, completions, mask, cut, empty)), strict=True)
        texts = []
        for batches in steps:
            parts_of_step = [next(parts) for _ in batches]
            texts_of_step = [training_batch(*part[:4], pad=self.pad) for part in parts_of_step]
            for batch, rows in zip(texts_of_step, batches, strict=True):
                if not self.keep_mask:
                    batch.attention_mask = None
                self.teacher.read(batch, rows)
            counts = (sum(part[at].sum() for part in parts_of_step) for at in (4, 5))
            texts.append(StepText(source, texts_of_step, sum(len(part[0]) for part in parts_of_step), *counts))
        return texts

    def _from_dataset(self, collated: list[dict[str, torch.Tensor]]) -> StepText:
        answered = sum(int((rows["labels"] != IGNORE).any(1).sum()) for rows in collated)
        cut = sum(int(rows["answer_cut"].sum()) for rows in collated if "answer_cut" in rows)
        batches = []
        for rows in collated:  # still on the CPU, where counting costs no wait
            batch = Batch.of(rows)
            mask = batch.attention_mask
            if not self.keep_mask and bool((mask[:, :-1] >= mask[:, 1:]).all()):
                batch.attention_mask = None
            self.teacher.read(batch, rows)
            batches.append(batch.to(self.accelerator.device))
        return StepText(Source.DATASET, batches, answered, cut)

    def _complete(
        self, prompts, prompt_mask, source: Source, seed: int, cached: list[list[int] | None], step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Completions (B, T) and mask of left-padded prompts (B, P); `cached` has the cache's of each, or None."""
        if source is Source.ON_POLICY or self.cache is None:
            return self._generate(prompts, prompt_mask, source, seed)
        rows, texts = unpadded_rows(prompts, prompt_mask), list(cached)
        first = {tuple(row): i for i, row in reversed([*enumerate(rows)])}  # prompts that are equal get one text
        missing = [i for i, text in enumerate(texts) if text is None and first[tuple(rows[i])] == i]
        if self.teacher.sharded:  # ranks run the same forwards: all generate everything, or none generates
            total = self.accelerator.reduce(torch.tensor(len(missing), device=prompts.device), reduction="sum")
            missing = list(range(len(rows))) if total > 0 else []
        if missing:
            at = torch.tensor(missing, device=prompts.device)
            written = unpadded_rows(*self._generate(prompts[at], prompt_mask[at], source, seed))
            self.cache.store([rows[i] for i in missing], written, step, self.accelerator.process_index)
            for i, text in zip(missing, written, strict=True):
                texts[i] = texts[i] or text
        texts = [texts[first[tuple(row)]] for row in rows]
        width = max(map(len, texts))
        ids = torch.tensor([text + [self.pad] * (width - len(text)) for text in texts], device=prompts.device)
        lengths = torch.tensor([len(text) for text in texts], device=prompts.device)
        return ids, (torch.arange(width, device=prompts.device) < lengths[:, None]).long()

    def _generate(self, prompts, prompt_mask, source: Source, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        write = self.write_student if source is Source.ON_POLICY else self.teacher.write
        return write(prompts, prompt_mask, self.configs[source], seed)
