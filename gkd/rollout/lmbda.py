"""λ of each optimizer step: constant, on a schedule, or by which text teaches more per second (`--lmbda auto`)."""

import math
import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from gkd.config.training import AUTO, GKDArguments
from gkd.data.batch import Source

logger = get_logger(__name__)
_POOLED = 4  # probes that a decision is made from, the latest
_LEAST = 2  # with fewer, how much they differ from each other is not known
_CLEAR = 2  # standard errors by which given text is ahead, for probes to be put off
_SHARE = 0.5  # of on-policy steps, once they gain more


class Measure(Protocol):
    """See `gkd.training.evaluation.HeldOutProbe`."""

    identity: str  # of what is measured: figures of another are not compared

    def __call__(self) -> list[float]:
        """The divergence of each held-out row (R,), the same on all ranks. Collective."""


class Schedule:
    """λ by the flags: a function of the step alone."""

    def __init__(self, args: GKDArguments):
        self.args = args

    def value(self, step: int, last: int) -> float:
        """λ of a step, counted from 0, in a run of `last` steps."""
        args = self.args
        if args.lmbda_schedule == "constant":
            return args.lmbda
        steps = last if args.lmbda_steps is None else args.lmbda_steps
        if steps < 1:
            steps = math.ceil(steps * last)
        if args.lmbda_schedule == "step":
            return args.lmbda if step >= steps else 0.0
        return args.lmbda * min(step / max(steps - 1, 1), 1.0)

    def is_probe(self, step: int) -> bool:
        return False

    def known_until(self, done: int) -> int:
        """The first step whose λ is not known after `done` steps."""
        return sys.maxsize

    def begin(self, done: int) -> None:
        """Before a step, after `done` steps. Collective."""

    def end(self, source: Source) -> None:
        """After a step."""

    def figures(self, step: int, last: int) -> dict[str, float]:
        """For the log after a step, counted from 0."""
        return {} if self.args.lmbda_schedule == "constant" else {"lmbda": self.value(step, last)}

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps, for `load`; the same on all ranks but for seconds, of which the first rank's count."""
        return None

    def load(self, state: dict[str, Any] | None) -> None:
        """`state` of a checkpoint; None at the start of a run."""


class AutoLambda(Schedule):
    """λ = 0 while held-out divergence falls faster per second on given text, λ = 0.5 from then on.

    The last steps before each multiple of `--lmbda_probe_steps` are a probe: they are on-policy, and steps of the run like
    any others. Held-out divergence is measured before and after. Its fall in the probe is compared with the mean of that in
    the supervised steps before and after: so a trend cancels. Supervised steps are cheap, so a second of a few of them says
    little: these are all there are. What decides is KL(student‖teacher) on text that the student writes for it: in
    experiments its fall ranks λ = 0 and λ = 1 as accuracy does, and that of the forward KL on given answers does not. The
    text is written each time: much of what given text teaches is not to get where the student is bad, which text of an
    earlier student does not show. Rows and random numbers are the same, and differences are taken row by row.

    Before each probe the mean over the last ones decides: λ is 0.5 from there on if a second of on-policy steps lowers the
    divergence by as much as a second of supervised ones, and by a standard error more; or if supervised steps do not lower
    it by a standard error any more, and on-policy ones are not behind by one. The few steps of a probe say little beside
    the many around it, and going over too early costs more than going over late. It stays so: what given text still teaches
    gets less in the course of a run, and each probe costs. Half of the steps keep given text, since with none the student's
    can run away: a text that goes wrong is long, and soon there is nothing else to train on.

    Where given text is ahead by two standard errors, the next two probes are put off, and four, eight ... each time that this
    is seen again. Then it begins anew with two probes. So a run in which given text wins to its end makes a few probes only.

    The seconds of a step of each kind are taken until the first comparison, and never again.

    Args:
        supervised: who writes the text of the supervised steps.
        clock: seconds, when the device's work is done, those of capturing graphs left out.
    """

    def __init__(self, args: GKDArguments, supervised: Source, measure: Measure, clock: Callable[[], float]):
        super().__init__(args)
        self.supervised, self.measure, self.clock = supervised, measure, clock
        self.probe, self.interval = args.probe_length, args.lmbda_probe_steps
        self._probes = [self.interval, self.probe, measure.identity]  # what can be compared
        self.load(None)

    def load(self, state: dict[str, Any] | None) -> None:
        state = state or {}
        self._since: int | None = state.get("since")  # λ is _SHARE from this step on
        self._made: int = state.get("made", 0)  # probes
        self._figures: dict[str, float] = state.get("figures", {})
        self._costs: list[float] | None = state.get("costs")  # seconds of a supervised and of an on-policy step
        if state.get("probes") != self._probes:
            state = {}
        self._seconds: dict[str, list[float]] = state.get("seconds", {"supervised": [], "on_policy": []})
        self._falls: list[list[list[float]]] = state.get("falls", [])  # a step, by probe and kind, of each row (R,)
        self._measured: dict[int, list[float]] = {int(step): m for step, m in state.get("measured", {}).items()}
        self._put_off: int = state.get("put_off", 0)  # how many probes the last time
        self._quiet_until: int = state.get("quiet_until", 0)  # no probes before this step, a multiple of the interval
        self._started: float | None = None

    def state(self) -> dict[str, Any]:
        return {
            "probes": self._probes,
            "since": self._since,
            "made": self._made,
            "figures": self._figures,
            "costs": self._costs,
            "seconds": self._seconds,
            "falls": self._falls,
            "measured": self._measured,
            "put_off": self._put_off,
            "quiet_until": self._quiet_until,
        }

    def value(self, step: int, last: int) -> float:
        if self._since is not None and step >= self._since:
            return _SHARE
        probes = step >= self._quiet_until and step % self.interval >= self.interval - self.probe
        return 1.0 if probes else 0.0

    def is_probe(self, step: int) -> bool:
        return self._since is None and self.value(step, 0) == 1

    def known_until(self, done: int) -> int:
        """The start of the next probe, where it may decide."""
        if self._since is not None:
            return sys.maxsize
        following = (done + self.probe) // self.interval * self.interval
        return max(following, self._quiet_until) + self.interval - self.probe

    def begin(self, done: int) -> None:
        if self._since is not None:
            return
        if done >= self._quiet_until:
            self._look(done)
        self._started = self.clock() if self._costs is None and self._since is None else None

    def _look(self, done: int) -> None:
        """Measures where a probe begins or ends, and decides where the next one begins."""
        place = done % self.interval
        if place in (0, self.interval - self.probe) and done not in self._measured:
            self._measured[done] = self.measure()
            start = done - self.interval  # of the last probe
            marks = [start + self.probe - self.interval, start, start + self.probe, done]
            if place and all(mark in self._measured for mark in marks):
                measured = [self._measured[mark] for mark in marks]
                self._measured = dict(zip(marks[2:], measured[2:], strict=True))
                self._compare(done, *map(np.array, measured))
            if place and self.is_probe(done):
                self._made += 1

    def end(self, source: Source) -> None:
        if self._started is not None:
            kind = "on_policy" if source is Source.ON_POLICY else "supervised"
            self._seconds[kind].append(self.clock() - self._started)
            self._started = None

    def _compare(self, step: int, *measured: np.ndarray) -> None:
        """Compares a probe with the steps around it by four measurements of each row (R,), and decides."""
        before, start, end, after = measured
        supervised = (before - start + end - after) / 2 / (self.interval - self.probe)
        falls = [supervised.tolist(), ((start - end) / self.probe).tolist()]
        self._falls = [*self._falls, falls][-_POOLED:]
        if self._costs is None:
            costs = [self._cost(kind) for kind in ("supervised", "on_policy")]
            self._costs, self._seconds = broadcast_object_list([costs])[0], {"supervised": [], "on_policy": []}
        gains = np.array(self._falls) / np.array(self._costs)[:, None]  # (probes, 2, R) nats a token a second
        ahead = gains[:, 1] - gains[:, 0]  # (probes, R)
        (supervised, on_policy), error, supervised_error = gains.mean((0, 2)), _error(ahead), _error(gains[:, 0])
        self._figures = {
            "lmbda_gain_supervised": float(supervised),
            "lmbda_gain_supervised_error": supervised_error,
            "lmbda_gain_on_policy": float(on_policy),
            "lmbda_gain_error": error,  # of their difference
            "lmbda_cost_ratio": self._costs[1] / self._costs[0],
        }
        exhausted = supervised <= supervised_error and ahead.mean() >= -error
        if len(gains) >= _LEAST and (exhausted or ahead.mean() >= error):
            self._since = step
            logger.warning(
                f"--lmbda auto: half of the steps are on-policy from step {step} on, where the divergence falls by {on_policy:.3g} nats a token "
                f"a second, and by {supervised:.3g} on given text (difference ± {error:.2g})."
            )
        elif len(gains) >= _LEAST and ahead.mean() <= -_CLEAR * error:
            self._put_off = 2 * self._put_off or 2
            self._quiet_until = (step // self.interval + self._put_off) * self.interval
            self._falls, self._measured = [], {}

    def _cost(self, kind: str) -> float:
        """Seconds of a step. The first ones are left out, where models warm up.

        The student's text is generated for several steps at once, and the teacher's for an unknown number of them.
        """
        seconds = self._seconds[kind]
        if kind == "supervised" and self.supervised is Source.TEACHER:
            return float(np.mean(seconds))
        together = self.args.steps_per_generation if kind == "on_policy" else 1
        groups = [np.mean(seconds[i : i + together]) for i in range(0, len(seconds), together)]
        return float(np.median(groups[1:] or groups))

    def figures(self, step: int, last: int) -> dict[str, float]:
        since = {"lmbda": 0.0} if self._since is None else {"lmbda": _SHARE, "lmbda_since": float(self._since)}
        return since | {"lmbda_probes": float(self._made)} | self._figures


def _error(values: np.ndarray) -> float:
    """Standard error of the mean of values (probes, R). Both rows and probes differ by chance: batches do."""
    probes, rows = values.shape
    of_rows = values.mean(0).std(ddof=1) / math.sqrt(rows)
    return math.hypot(of_rows, values.mean(1).std(ddof=1) / math.sqrt(probes) if probes > 1 else 0.0)


def lambda_of(
    args: GKDArguments, supervised: Source, measure: Callable[[], Measure], clock: Callable[[], float]
) -> Schedule:
    """λ as `--lmbda` and `--lmbda_schedule` say; `measure` gives what `auto` measures by."""
    return AutoLambda(args, supervised, measure(), clock) if args.lmbda == AUTO else Schedule(args)
