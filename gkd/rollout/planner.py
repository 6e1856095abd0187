"""Which optimizer steps' text is generated when: for the next step, and ahead where allowed."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from gkd.config.training import GKDArguments
from gkd.data.batch import Source, keys_of
from gkd.generation.sampling import SAMPLING_VERSION, sampling_seed
from gkd.io.errors import first_line
from gkd.io.files import read_json, write_json
from gkd.rollout.guard import RolloutGuard
from gkd.rollout.lmbda import Schedule
from gkd.rollout.steps import PlannedStep, StepText, TextWriter, draw_source, load_pending, save_pending
from gkd.runs.folder import run_id

logger = get_logger(__name__)
# In a checkpoint: the version of sampling that drew its text, and what `--lmbda auto` and `--rollout_guard` have seen.
_SAMPLING, _STATES = "sampling.json", "rollout.json"


@dataclass
class Rollout:
    """Plans the optimizer steps of a run and has their text written."""

    args: GKDArguments
    supervised: Source  # of the text of steps that are not on-policy
    lmbda: Schedule
    writer: TextWriter
    note_phase: Callable[[str], None]  # takes the present phase, which an error names
    guard: RolloutGuard | None = None
    _planned: deque[PlannedStep] = field(default_factory=deque)  # the next step, and others whose rows have been read
    _pending: dict[int, StepText] = field(default_factory=dict)  # text from a checkpoint, by its step

    def __post_init__(self):
        self.accelerator, self.teacher, self.cache = self.writer.accelerator, self.writer.teacher, self.writer.cache
        self.server = self.writer.server
        self._in_step = self.server is None and self.teacher.sharded  # ranks write the teacher's text together

    def restart(self) -> None:
        """Drops the steps that an earlier attempt to train planned."""
        self._planned.clear()

    def draw(self, step: int, last: int = 0) -> Source:
        """The source of a step's text, in a run of `last` steps."""
        source = draw_source(self.args.seed, step, self.lmbda.value(step, last), self.supervised is Source.TEACHER)
        replaced = self.guard is not None and self.guard.replaces(step) and not self.lmbda.is_probe(step)
        return self.supervised if replaced else source

    def next_step(self, rows: Iterator[dict], micro_batches: int, done: int, last: int) -> tuple[StepText | None, int]:
        """The text of the next step, prepared by the teacher, and how many of the dataset's micro-batches it is from.

        None and 0 at the end of the epoch or the run.

        Nothing here changes the state of the global random generators: see gkd.rollout.steps and `sampling_noise`.

        Args:
            rows: the collated micro-batches that are left of the epoch.
            micro_batches: how many a step takes.
            done: optimizer steps so far.
            last: optimizer steps of the run; 0 or less is no limit.
        """
        self.lmbda.begin(done)
        until = self.lmbda.known_until(done)
        if self.guard is not None:
            self.guard.begin(done)
            for step, planned in enumerate(self._planned, done):  # it may have acted since
                if planned.text is None:
                    planned.source = self.draw(step, last)

        def plan() -> bool:
            """Reads one more step's rows; False at the end of the epoch or the run, or where its source is not known yet."""
            step = done + len(self._planned)
            if step >= last > 0 or step >= until:
                return False
            collated = list(islice(rows, micro_batches))
            if collated:
                source, text = self.draw(step, last), self._pending.pop(step, None)
                fits = text is not None and text.source is source
                self._planned.append(PlannedStep(source, collated, text=text if fits else None))
            return bool(collated)

        if not self._planned and not plan():
            return None, 0
        with self.teacher.stay():
            self._write(plan, done)
            if self.args.compares:
                self.note_phase("the teacher's forward")
                self.teacher.prepare(self._planned[0].text.batches)
        step = self._planned.popleft()
        return step.text, len(step.collated)

    def _write(self, plan: Callable[[], bool], done: int) -> None:
        """Generates text for the next step, and ahead where allowed.

        The student's text goes stale, so it is written `steps_per_generation` steps at a time. The teacher's does not,
        and more rows hardly make a generation slower, so it is filled with prompts of later steps. That needs the cache,
        where a resumed run finds the same text.
        """
        source = self._planned[0].source
        if self._planned[0].text is not None:
            return
        ahead = self.args.steps_per_generation
        if source is Source.DATASET:
            ahead = 1
        elif source is Source.TEACHER and self.cache is not None and not self._in_step:
            ahead = self._fill_generation(plan)
        while len(self._planned) < ahead and plan():
            pass
        steps = [step for step in islice(self._planned, ahead) if step.source is source and step.text is None]
        if source is Source.TEACHER and self._in_step:
            for step in steps:
                self._look_up(step)
        seed = sampling_seed(self.args.seed, done, self.accelerator.process_index)
        watched = self.guard is not None and source is Source.ON_POLICY
        whole = not watched or self.lmbda.is_probe(done)  # a probe is compared with others, and takes its time
        texts = self.writer.write(steps, seed, done, None if whole else self.guard.limit(done))
        for step, text in zip(steps, texts, strict=True):
            step.text = text
        if watched:
            self.guard.see(texts, done)

    def _fill_generation(self, plan: Callable[[], bool]) -> int:
        """Over how many steps the prompts that the cache lacks fill a generation of each rank.

        Counted from the next step, however many are planned: a resumed run, which has read fewer rows, writes the same.
        """
        full = self.args.generation_batch_size
        missing = ahead = 0
        while missing < full * self.accelerator.num_processes and ahead < full:
            if ahead == len(self._planned) and not plan():
                break
            step = self._planned[ahead]
            if step.source is Source.TEACHER and step.text is None:
                missing += self._look_up(step)
            ahead += 1
        return ahead

    def _look_up(self, step: PlannedStep) -> int:
        """Looks a step's prompts up in the cache; returns how many it lacks, summed over the ranks.

        Ranks store text only after all of them have looked up all steps of a generation, so none depends on another's
        speed. They plan ahead by the sum, in step, since reading rows may be collective.
        """
        prompts = [key for rows in step.collated for key in keys_of(rows)]
        step.cached = [None] * len(prompts) if self.cache is None else self.cache.lookup(prompts)
        missing = torch.tensor(step.cached.count(None), device=self.accelerator.device)
        return int(self.accelerator.reduce(missing, reduction="sum"))

    def figures(self, done: int, last: int) -> dict[str, float]:
        """For the log after `done` steps of `last`. Collective."""
        figures = self.lmbda.figures(done - 1, last) | ({} if self.guard is None else self.guard.figures())
        if self.server is not None:  # what all ranks used since the last log
            used = self.server.api.flush()
            sums = self.accelerator.reduce(torch.tensor([*used.values()], device=self.accelerator.device), "sum")
            figures |= {f"teacher_text/{name}": value for name, value in zip(used, sums.tolist(), strict=True)}
        return figures

    # ------------------------------------------------------------------ checkpoints

    def _parts(self) -> dict[str, Schedule | RolloutGuard]:
        """Those that may have a state."""
        return {"lmbda": self.lmbda} | ({} if self.guard is None else {"guard": self.guard})

    def _load_parts(self, checkpoint: str | None) -> None:
        """Raises ValueError if the checkpoint's states are damaged."""
        path = Path(checkpoint or "", _STATES)
        states, problem = {}, None
        if checkpoint is not None and self.accelerator.is_main_process and path.is_file():
            try:
                states = read_json(path)
            except ValueError as error:
                problem = str(error)
        states, problem = broadcast_object_list([states, problem])
        if problem is not None:
            raise ValueError(f"{problem}. Resume from another checkpoint.")
        try:
            for name, part in self._parts().items():
                part.load(states.get(name))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {first_line(error)}. Resume from another checkpoint.") from error

    def save(self, checkpoint: Path, done: int) -> None:
        """Saves the text that is written ahead after `done` steps, and notes what the cache holds."""
        pending = {done + i: step.text for i, step in enumerate(self._planned) if step.text is not None}
        save_pending(checkpoint, pending, self.accelerator.process_index, self.accelerator.num_processes)
        if self.args.should_save:
            write_json(checkpoint / _SAMPLING, {"version": SAMPLING_VERSION})
            states = {name: part.state() for name, part in self._parts().items()}
            if any(state is not None for state in states.values()):
                write_json(checkpoint / _STATES, states)
        if self.cache is not None and self.args.should_save:
            self.cache.note(checkpoint)

    def resume(self, checkpoint: str | None, step: int, keep_text: bool) -> None:
        """Resumes from a checkpoint after `step` steps, or starts a run.

        `keep_text`: train on the checkpoint's text; False after a change of flags that it depends on.
        """
        self._pending = {}
        self._load_parts(checkpoint)
        run = Path(self.args.output_dir) if checkpoint is None else Path(checkpoint).parent
        if checkpoint is not None and (self.args.student_writes or self.args.seq_kd):
            noted = Path(checkpoint, _SAMPLING)
            if not noted.is_file() or read_json(noted) != {"version": SAMPLING_VERSION}:
                logger.warning(f"{checkpoint}: its version of gkd drew text in another way, so what follows differs.")
        if checkpoint is not None and keep_text:
            rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
            self._pending = load_pending(checkpoint, rank, ranks, self.accelerator.device)
        if (cache := self.cache) is None:
            return
        main = self.accelerator.is_main_process
        ids = [run_id(self.args.output_dir), run_id(run, make=False)] if main else [None, None]
        cache.run, source_run = broadcast_object_list(ids)
        for process in (main, self.accelerator.is_local_main_process and not main):  # machines may have a disk each
            if process:
                if checkpoint is not None and self.args.teacher_text_cache == "auto":
                    cache.take_from(run / cache.path.parent.name)
                cache.check()
                # Also entries of this folder's run: an attempt of it may have left no checkpoint.
                for identity in {cache.run, source_run} - {None}:
                    cache.forget_since(step, identity)
            self.accelerator.wait_for_everyone()
        if main and checkpoint is not None:
            cache.compare(Path(checkpoint))
