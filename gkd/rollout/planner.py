"""Which steps' text is written when: the plan of a run's optimizer steps, ahead where that is allowed."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from gkd.config.training import GKDArguments
from gkd.data.batch import Source
from gkd.generation.sampling import sampling_seed
from gkd.rollout.cache import TextCache
from gkd.rollout.steps import PlannedStep, StepText, load_pending, save_pending
from gkd.rollout.writer import TextWriter
from gkd.runs.folder import run_id
from gkd.teachers.base import Teacher

# From the epoch's rows, the rows of one more step; False where the epoch or the run has no more.
Plan = Callable[[], bool]


class Rollout:
    """Plans the optimizer steps of a run and has their text written.

    Args:
        draw: who writes the text of a step, from its number.
        writer: writes it.
        teacher: stays on the device while a step's text is written and prepared.
        note_phase: told what is going on, for an error's message.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: GKDArguments,
        draw: Callable[[int], Source],
        writer: TextWriter,
        teacher: Teacher,
        note_phase: Callable[[str], None],
    ):
        self.accelerator, self.args, self.draw = accelerator, args, draw
        self.writer, self.teacher, self.note_phase = writer, teacher, note_phase
        self._planned: deque[PlannedStep] = deque()  # the next step, and others whose rows have been read
        self._pending: dict[int, StepText] = {}  # text from a checkpoint, by its step

    @property
    def cache(self) -> TextCache | None:
        """Of the teacher's text."""
        return self.writer.cache

    def restart(self) -> None:
        """Drops what an earlier attempt to train has read ahead."""
        self._planned.clear()

    def next_step(self, rows: Iterator[dict], micro_batches: int, done: int, last: int) -> StepText | None:
        """The text of the next step, prepared by the teacher; None where the epoch or the run has no more.

        Nothing here may draw from, or leave a trace in, the global generators: see gkd.rollout.steps and
        `sampling_noise`.

        Args:
            rows: the rest of the epoch, collated, `micro_batches` of them to a step.
            done: how many optimizer steps are.
            last: how many the run has; 0 or less is no limit.
        """

        def plan() -> bool:
            step = done + len(self._planned)
            if step >= last > 0:
                return False
            collated = list(islice(rows, micro_batches))
            if collated:
                self._planned.append(PlannedStep(self.draw(step), collated, text=self._pending.pop(step, None)))
            return bool(collated)

        if not self._planned and not plan():
            return None
        with self.teacher.stay():
            self._write(plan, done)
            self.note_phase("the teacher's forward")
            self.teacher.prepare(self._planned[0].text.batches)
        return self._planned.popleft().text

    def _write(self, plan: Plan, done: int) -> None:
        """Generates text for the next step, and ahead where allowed.

        The student's text goes stale, so it is written `steps_per_generation` steps at a time. The teacher's does not:
        as many prompts as a generation holds are written at once, since more rows hardly make it slower. They go
        through the cache, so that a run that is resumed between finds the same text.
        """
        source = self._planned[0].source
        if self._planned[0].text is not None:
            return
        ahead = self.args.steps_per_generation
        if source is Source.DATASET:
            ahead = 1
        elif source is Source.TEACHER and self.cache is not None and not self.teacher.sharded:
            ahead = self._fill_generation(plan)
        while len(self._planned) < ahead and plan():
            pass
        steps = [step for step in islice(self._planned, ahead) if step.source is source and step.text is None]
        if source is Source.TEACHER and self.teacher.sharded:
            for step in steps:
                self._look_up(step)
        seed = sampling_seed(self.args.seed, done, self.accelerator.process_index)
        for step, text in zip(steps, self.writer.write(steps, seed, done), strict=True):
            step.text = text

    def _fill_generation(self, plan: Plan) -> int:
        """How many steps ahead the prompts that the cache lacks fill a generation of each rank.

        From the front, whatever has been read already: so a resumed run, which has read less, writes the same.
        """
        full = self.args.generation_batch_size
        lacking = ahead = 0
        while lacking < full * self.accelerator.num_processes and ahead < full:
            if ahead == len(self._planned) and not plan():
                break
            step = self._planned[ahead]
            if step.source is Source.TEACHER and step.text is None:
                lacking += self._look_up(step)
            ahead += 1
        return ahead

    def _look_up(self, step: PlannedStep) -> int:
        """Asks the cache for a step's text by the teacher; how many of its prompts, on all ranks, it has yet to answer.

        Whatever the ranks store, they store after all of them have looked up all steps of a generation: none depends on
        how fast another is. The sum over the ranks is what they compare, since reading ahead may itself be collective.
        """
        step.cached = self.writer.look_up(step.collated)
        lacking = torch.tensor(step.cached.count(None), device=self.accelerator.device)
        return int(
            self.accelerator.reduce(lacking, reduction="sum") if self.accelerator.num_processes > 1 else lacking
        )

    # ------------------------------------------------------------------ checkpoints

    def save(self, checkpoint: Path, done: int) -> None:
        """Keeps the text that was written ahead, and notes what the cache holds after `done` steps."""
        pending = {done + i: step.text for i, step in enumerate(self._planned) if step.text is not None}
        save_pending(checkpoint, pending, self.accelerator.process_index, self.accelerator.num_processes)
        if self.cache is not None and self.args.should_save:
            self.cache.note(checkpoint)

    def resume(self, checkpoint: str | None, step: int, keep_text: bool) -> None:
        """Goes on from a checkpoint after `step` steps, or begins anew.

        On resume, entries of the cache newer than the checkpoint are deleted, so the same batches are regenerated.

        Args:
            keep_text: train on the text that was written ahead; flags that change it say no.
        """
        self._pending = {}
        run = Path(self.args.output_dir) if checkpoint is None else Path(checkpoint).parent
        if checkpoint is not None and keep_text:
            rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
            self._pending = load_pending(checkpoint, rank, ranks, self.accelerator.device)
        cache = self.cache
        if cache is None:
            return
        main = self.accelerator.is_main_process
        ids = [run_id(self.args.output_dir), run_id(run, make=False)] if main else [None, None]
        cache.run, source_run = broadcast_object_list(ids)
        for process in (main, self.accelerator.is_local_main_process and not main):  # machines may have a disk each
            if process:
                if checkpoint is not None and self.args.teacher_text_cache == "auto":
                    cache.take_from(run / cache.path.parent.name)
                cache.check()
                # This folder's too, of an attempt that left no checkpoint.
                for identity in {cache.run, source_run} - {None}:
                    cache.forget_since(step, identity)
            self.accelerator.wait_for_everyone()
        if main and checkpoint is not None:
            cache.compare(Path(checkpoint))
