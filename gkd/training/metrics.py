"""Training metrics by source, averaged over tokens or completions and over ranks, once a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from gkd.data.batch import Source
from gkd.losses.divergences import TokenStatistics
from gkd.rollout.steps import StepText

_TOKEN_FIELDS = TokenStatistics._fields
_COUNTS = ("completions", "truncated", "empty")  # fields of a StepText
_FIELDS = (*_TOKEN_FIELDS, "tokens", "aligned", *_COUNTS)


class SourceMetrics:
    """Running sums on the device, one row a source: no host sync until `flush`. `unknown` statistics are not told."""

    def __init__(self, accelerator: Accelerator, unknown: tuple[str, ...] = ()):
        self.accelerator = accelerator
        self._told = [name for name in _TOKEN_FIELDS if name not in unknown]
        self.sums = torch.zeros(len(Source), len(_FIELDS), device=accelerator.device)  # (3, F)
        self.balance = torch.zeros(2, device=accelerator.device)  # load-balancing losses times rows, and rows
        self.has_balance = False

    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the sums, for `restore`."""
        return self.sums.clone(), self.balance.clone()

    def restore(self, state: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.sums.copy_(state[0])
        self.balance.copy_(state[1])

    def add_tokens(self, source: Source, sums: torch.Tensor, tokens: int, aligned: torch.Tensor | None = None) -> None:
        """Adds the summed `TokenStatistics` (6,) of `tokens` scored positions, unless one is not finite.

        `aligned`: bool (N,), of a teacher with another tokenizer: where it is compared with.
        """
        finite = sums.detach().isfinite().all()
        compared = sums.new_full((1,), tokens) if aligned is None else aligned.sum(0, keepdim=True).to(sums)
        row = torch.cat([sums.detach(), sums.new_full((1,), tokens), compared])
        self.sums[source, : len(row)] += torch.where(finite, row, 0.0)

    def add_balance(self, loss: torch.Tensor, rows: int) -> None:
        """Adds the load-balancing loss of a micro-batch, a scalar, unless it is not finite."""
        loss = loss.detach()
        self.balance += torch.where(loss.isfinite(), torch.stack([loss, torch.ones_like(loss)]) * rows, 0.0)
        self.has_balance = True

    def add_completions(self, step: StepText) -> None:
        for name in _COUNTS:
            self.sums[step.source, _FIELDS.index(name)] += getattr(step, name)

    def flush(self) -> tuple[dict[str, float], float]:
        """The averages since the last flush by name (`on_policy/loss`, ...), and the number of scored tokens. Collective."""
        sums = self.accelerator.reduce(self.sums, reduction="sum").tolist()
        self.sums.zero_()
        logs: dict[str, float] = {}
        for source in Source:
            row = dict(zip(_FIELDS, sums[source], strict=True))
            if row["tokens"]:
                # The loss is that of all tokens; KLs and the like are averages over those that are compared.
                counts = {"loss": row["tokens"]}
                compared = max(row["aligned"], 1.0)
                logs |= {f"{source.label}/{name}": row[name] / counts.get(name, compared) for name in self._told}
                if row["aligned"] < row["tokens"]:
                    logs[f"{source.label}/aligned"] = row["aligned"] / row["tokens"]
            if row["completions"]:
                logs[f"{source.label}/completion_length"] = row["tokens"] / row["completions"]
                logs[f"{source.label}/truncated"] = row["truncated"] / row["completions"]
                logs[f"{source.label}/empty"] = row["empty"] / row["completions"]
        if self.has_balance:
            total, rows = self.accelerator.reduce(self.balance, reduction="sum").tolist()
            self.balance.zero_()
            logs |= {"aux_loss": total / rows} if rows else {}
        return logs, sum(row[_FIELDS.index("tokens")] for row in sums)


class Phases:
    """The present phase of a run: timed for the log, shown on the progress bar, named by an out-of-memory error.

    Args:
        capture_seconds: seconds spent so far on capturing CUDA graphs in generation and in training, logged apart.
        on_show: shows a phase.

    Attributes:
        doing: the phase in words, such as "generating (student)" or "the teacher's forward".
    """

    def __init__(self, capture_seconds: Callable[[], tuple[float, float]], on_show: Callable[[str], None]):
        self.doing = "training"
        self._capture_seconds, self._on_show = capture_seconds, on_show
        self._captured = (0.0, 0.0)  # as of the last log
        self._seconds = {"generating": 0.0, "training": 0.0}
        self._phase, self._since = None, 0.0

    def at(self, doing: str) -> None:
        self.doing = doing

    def show(self, doing: str) -> None:
        self.doing = doing
        self._on_show(doing)

    def enter(self, phase: str | None) -> None:
        """Times `phase` from now on: "generating", "training" or, with None, nothing."""
        now = time.perf_counter()
        if self._phase is not None:
            self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    @contextmanager
    def apart(self, doing: str, then: str | None) -> Iterator[None]:
        """Shows `doing` and times nothing, captures of graphs included; `then` is timed afterwards."""
        self.enter(None)
        before = self._capture_seconds()
        self.show(doing)
        try:
            yield
        finally:
            self.enter(then)
            spent = zip(self._captured, before, self._capture_seconds(), strict=True)
            self._captured = tuple(logged + end - start for logged, start, end in spent)

    def captured(self) -> float:
        """Seconds spent on capturing so far."""
        return sum(self._capture_seconds())

    def flush(self) -> tuple[dict[str, float], float]:
        """Wall seconds of each phase since the last flush, without captures, for the log; and their sum with captures."""
        self.enter(self._phase)
        spent, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        before, self._captured = self._captured, self._capture_seconds()
        logs = {
            f"seconds_{phase}": seconds - (now - earlier)
            for (phase, seconds), now, earlier in zip(spent.items(), self._captured, before, strict=True)
        }
        if captured := sum(self._captured) - sum(before):
            logs["seconds_capturing"] = captured
        return logs, sum(spent.values())
