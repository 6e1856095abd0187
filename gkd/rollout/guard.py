"""`--rollout_guard`: what to do where the student's text stops ending, or repeats itself, much more than before."""

from collections.abc import Collection
from statistics import mean, median
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import gather_object

from gkd.config.training import GKDArguments
from gkd.data.batch import IGNORE
from gkd.metrics.tasks import repetition
from gkd.rollout.steps import StepText

logger = get_logger(__name__)
_STEPS, _COMPLETIONS = 5, 32  # in the window of the latest on-policy steps, at least
_LEAST, _MOST = 2, 6  # windows before it, which are the level
_ACTS = 20  # steps
_MORE_TRUNCATED, _REPEATS, _TIMES = 0.25, 0.1, 2
_DELAY = 4  # steps at least between what is seen and what is done: the student's text of steps before is written


class RolloutGuard:
    """Watches the student's text; where it gets bad, cuts it short and mixes in other text for some steps.

    The latest on-policy steps, at least 5 and 32 completions, are compared with the six times as many before: bad is a mean
    share of completions cut off by the limit that is 0.25 higher, or a mean share of repeated 4-grams above 0.1 that is
    twice as high, if more than half of the steps are above the earlier mean: a single one is no alarm. Then for 20 steps
    completions have at most as many tokens as one that ends has in the median, or half of `--max_new_tokens`, and every
    second on-policy step takes given text. Afterwards it watches again. What stays bad after a few times is the new level.

    It acts on steps whose on-policy text nobody has written yet, so a resumed run repeats it, and on all ranks alike.
    """

    def __init__(self, args: GKDArguments, stop_ids: Collection[int]):
        self.args, self.stop_ids = args, set(stop_ids)
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.window = max(_STEPS, -(-_COMPLETIONS // rows))
        self.delay = max(args.steps_per_generation, _DELAY)
        self._acted = False  # since the last log
        self.load(None)

    def load(self, state: dict[str, Any] | None) -> None:
        """`state` of a checkpoint; None at the start of a run."""
        state = state or {}
        # By on-policy step: share truncated, share repeated, and tokens of completions that end, in the median, or None.
        self._seen: list[list[float | None]] = state.get("seen", [])
        self._acts_in: list[int] = state.get("acts_in", [0, 0])  # from this step to before that one
        self._limit: int | None = state.get("limit")
        self._fresh: int = state.get("fresh", 0)  # steps seen since it acted

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for `load`; the same on all ranks."""
        return {"seen": self._seen, "acts_in": self._acts_in, "limit": self._limit, "fresh": self._fresh}

    def acts(self, step: int) -> bool:
        return self._acts_in[0] <= step < self._acts_in[1]

    def replaces(self, step: int) -> bool:
        """Whether an on-policy step is to take given text."""
        return self.acts(step) and step % 2 == 1

    def limit(self, step: int) -> int | None:
        """Tokens that a completion may have, where that is less than --max_new_tokens."""
        return self._limit if self.acts(step) else None

    def begin(self, done: int) -> None:
        """Before a step, after `done` steps."""
        self._acted |= self.acts(done)

    def figures(self) -> dict[str, float]:
        """For the log: 1 if it acted on a step since the last log."""
        acted, self._acted = self._acted, False
        return {"rollout_guard": float(acted)}

    def see(self, texts: list[StepText], done: int) -> None:
        """Looks at the student's text of steps that was generated after `done` steps. Collective."""
        if done < self._acts_in[1]:  # also of text from before it acts: one alarm is enough
            return
        seen = [self._counts(text) for text in texts]
        for counts in zip(*(gather_object([seen])), strict=True):  # of a step, by rank
            truncated, completions = (sum(count[i] for count in counts) for i in (0, 1))
            repeated, lengths = ([value for count in counts for value in count[i]] for i in (2, 3))
            self._seen.append([truncated / completions, mean(repeated), median(lengths) if lengths else None])
            self._fresh += 1
        self._seen = self._seen[-self.window * (1 + _MOST) :]
        if len(self._seen) >= self.window * (1 + _LEAST) and self._fresh >= self.window:
            self._judge(done)

    def _counts(self, text: StepText) -> tuple[int, int, list[float], list[int]]:
        """Completions cut off, and all; repeated shares of rows, and the lengths of those that end. Of this rank."""
        labels = [row for batch in text.batches for row in batch.labels.cpu()]
        rows = [row[row != IGNORE].tolist() for row in labels]
        lengths = [len(row) for row in rows if row and row[-1] in self.stop_ids]
        return int(text.truncated), text.completions, [repetition(row) for row in rows], lengths

    def _judge(self, done: int) -> None:
        before, now = self._seen[: -self.window], self._seen[-self.window :]
        cut_before, repeats_before = (mean(step[i] for step in before) for i in (0, 1))
        cut, repeats = (mean(step[i] for step in now) for i in (0, 1))
        above = [sum(step[i] > level for step in now) for i, level in enumerate((cut_before, repeats_before))]
        cuts = cut > cut_before + _MORE_TRUNCATED and above[0] > self.window / 2
        if not cuts and not (repeats > max(_REPEATS, _TIMES * repeats_before) and above[1] > self.window / 2):
            return
        start, most = done + self.delay, self.args.max_new_tokens
        lengths = [step[2] for step in self._seen if step[2] is not None]
        usual = int(median(lengths)) if lengths else most
        self._limit = max(usual if usual < most else most // 2, 1)
        self._acts_in, self._fresh = [start, start + _ACTS], 0
        logger.warning(
            f"--rollout_guard: in the student's text up to step {done} {cut:.0%} of completions are cut off by the limit "
            f"(before {cut_before:.0%}), and {repeats:.0%} of 4-grams are repeated (before {repeats_before:.0%}). For "
            f"{_ACTS} steps from step {start} on, completions have at most {self._limit} tokens, and every second on-policy "
            "step takes other text."
        )
