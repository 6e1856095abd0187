"""Training metrics per source, averaged over tokens (or completions) and ranks, gathered once per log."""

import time

import torch
from accelerate import Accelerator

from gkd.data.batch import Source
from gkd.losses.divergences import TokenStatistics

_TOKEN_FIELDS = TokenStatistics._fields
_FIELDS = (*_TOKEN_FIELDS, "tokens", "completions", "truncated", "empty")


class SourceMetrics:
    """Running sums on the device, one row a source: no host sync until `flush`."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.sums = torch.zeros(len(Source), len(_FIELDS), device=accelerator.device)  # (3, F)
        self.balance = torch.zeros(2, device=accelerator.device)  # load-balancing losses times rows, and rows
        self.has_balance = False

    def state(self) -> tuple[torch.Tensor, ...]:
        """What has been added, for `restore`."""
        return self.sums.clone(), self.balance.clone()

    def restore(self, state: tuple[torch.Tensor, ...]) -> None:
        for tensor, before in zip((self.sums, self.balance), state, strict=True):
            tensor.copy_(before)

    def add_tokens(self, source: Source, sums: torch.Tensor, tokens: int) -> None:
        """`sums`: the summed `TokenStatistics` of `tokens` scored positions, (6,); left out if one is not finite."""
        finite = sums.detach().isfinite().all()
        row = torch.cat([sums.detach(), sums.new_full((1,), tokens)])
        self.sums[source, : len(row)] += torch.where(finite, row, 0.0)

    def add_balance(self, loss: torch.Tensor, rows: int) -> None:
        """The load-balancing loss of a micro-batch of `rows`, a scalar; left out if it is not finite."""
        loss = loss.detach()
        self.balance += torch.where(loss.isfinite(), torch.stack([loss, torch.ones_like(loss)]) * rows, 0.0)
        self.has_balance = True

    def add_completions(
        self, source: Source, completions: int, truncated: torch.Tensor | int, empty: torch.Tensor | int
    ) -> None:
        """Of `completions`, how many ran into a length limit (`truncated`), or are a stop token alone (`empty`)."""
        for name, count in (("completions", completions), ("truncated", truncated), ("empty", empty)):
            self.sums[source, _FIELDS.index(name)] += count

    def flush(self) -> tuple[dict[str, float], float]:
        """The averages since the last flush by name (`on_policy/loss`, ...), and the number of scored tokens.

        Collective: every rank must call it at the same time.
        """
        sums = self.accelerator.reduce(self.sums, reduction="sum").tolist()
        self.sums.zero_()
        logs: dict[str, float] = {}
        for source in Source:
            row = dict(zip(_FIELDS, sums[source], strict=True))
            if row["tokens"]:
                logs |= {f"{source.label}/{name}": row[name] / row["tokens"] for name in _TOKEN_FIELDS}
            if row["completions"]:
                logs[f"{source.label}/completion_length"] = row["tokens"] / row["completions"]
                logs[f"{source.label}/truncated"] = row["truncated"] / row["completions"]
                logs[f"{source.label}/empty"] = row["empty"] / row["completions"]
        if self.has_balance:
            total, rows = self.accelerator.reduce(self.balance, reduction="sum").tolist()
            self.balance.zero_()
            logs |= {"aux_loss": total / rows} if rows else {}
        return logs, sum(row[_FIELDS.index("tokens")] for row in sums)


class PhaseClock:
    """Wall seconds spent in each phase since the last `flush`."""

    def __init__(self):
        self.seconds = {"generating": 0.0, "training": 0.0}
        self._phase, self._since = None, 0.0

    def enter(self, phase: str | None) -> None:
        now = time.perf_counter()
        if self._phase is not None:
            self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def flush(self) -> dict[str, float]:
        self.enter(self._phase)
        spent, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        return spent
