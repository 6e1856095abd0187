"""Training metrics per source, averaged over tokens (or completions) and ranks, gathered once per log."""

import torch
from accelerate import Accelerator

from gkd.losses import TokenStatistics
from gkd.sources import Source

_TOKEN_FIELDS = TokenStatistics._fields
_FIELDS = (*_TOKEN_FIELDS, "tokens", "completions", "truncated")


class SourceMetrics:
    """Running sums on the device, one row a source: no host sync until `flush`."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.sums = torch.zeros(len(Source), len(_FIELDS), device=accelerator.device)  # (3, F)

    def add_tokens(self, source: Source, sums: torch.Tensor, tokens: int) -> None:
        """`sums`: the summed `TokenStatistics` of `tokens` scored positions, (6,)."""
        self.sums[source, : len(_TOKEN_FIELDS)] += sums.detach()
        self.sums[source, _FIELDS.index("tokens")] += tokens

    def add_completions(self, source: Source, completions: int, truncated: torch.Tensor | int) -> None:
        """`truncated`: how many of them ran into a length limit instead of ending by a stop token."""
        self.sums[source, _FIELDS.index("completions")] += completions
        self.sums[source, _FIELDS.index("truncated")] += truncated

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
        return logs, sum(row[_FIELDS.index("tokens")] for row in sums)
