"""The divergence from a teacher of whom only the likeliest k tokens and the mass of all others are known.

Both distributions are coarsened to k + 1 buckets, the teacher's k tokens and the tail, and compared there by
`gkd.losses.divergences`: exactly, with no assumption about the tail. What this is of the whole divergence:

* A lower bound. Coarsening is a deterministic map, and no f-divergence grows under one (data processing inequality);
  all that `--divergence` knows are f-divergences.
* It grows with k, since the buckets of k are made of those of k + 1, and is the whole divergence at k = V.
* Within the tail the student is free: the gradient moves the tail's mass, and leaves its shape as it is.

So what is lost depends on whose mass weighs. At β = 0 it is the teacher's, of which a tail holds little. At β = 1 it is
the student's, which lies in the tail as long as the student is far off: then little of the divergence is left, and of
its gradient only that the mass should leave the tail; skew KLs and the total variation have the same two sides. Figures are in benchmarks/RESULTS.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gkd.losses.divergences import Divergence, TokenStatistics, mix_cross_entropy, statistics_and_gradient
from gkd.losses.projection import Projected, chunk_tokens
from gkd.losses.targets import Compare, Target, compare_in_torch

# Stands for log 0, so that 0 · (log 0 - log 0) is 0: its exponential is 0 in float64 too.
_LOG_ZERO = -1e4


@dataclass
class TopK:
    """The teacher's distribution at n positions, coarsened.

    ids: int (n, k), the likeliest tokens, the likeliest first. log_probs: (n, k) of any float dtype, theirs. tail:
    (n,), the logarithm of the mass of all other tokens, -inf where there are none.

    In float16 a log-probability l is off by at most |l| · 2^-11, so all probabilities together by the entropy · 2^-11,
    about a thousandth; the buckets are normalised again when they are read, which keeps KLs from falling below 0.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    tail: torch.Tensor

    @classmethod
    def of_logits(cls, logits: torch.Tensor, k: int, temperature: float = 1.0) -> TopK:
        """Of logits (n, V), k <= V: ids int32, log-probabilities and tail in float32 (float64 for float64 logits)."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_probs = F.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
        top, ids = log_probs.topk(k)  # sorted
        tail = log_probs.scatter_(1, ids, -torch.inf).logsumexp(-1)  # not 1 - sum, which has no digits left
        return cls(ids.to(torch.int32), top, tail)

    @classmethod
    def of_target(
        cls, target: Target, count: int, vocab_size: int, k: int, temperature: float, device: torch.device
    ) -> TopK:
        """Of a target's `count` positions, a chunk of logits at a time, on `device`; as it is stored, see `stored`."""
        rows = min(max(chunk_tokens(vocab_size, device.type) // 2, 16), max(count, 1))
        logits = target.logits(vocab_size, rows)
        parts = [cls.of_logits(logits(slice(i, i + rows)), k, temperature).stored() for i in range(0, count, rows)]
        return cls.cat(parts) if parts else cls.empty(k)

    @classmethod
    def cat(cls, parts: list[TopK]) -> TopK:
        return cls(*(torch.cat(tensors) for tensors in zip(*(part.tensors for part in parts), strict=True)))

    @classmethod
    def empty(cls, k: int) -> TopK:
        """Of no position."""
        return cls(torch.zeros(0, k, dtype=torch.int32), torch.zeros(0, k).half(), torch.zeros(0))

    def stored(self) -> TopK:
        """As a cache keeps it: log-probabilities in float16, within its range (e^-65504 is 0); the tail in float32.

        The tail is one number a token, against 6 k bytes of the others: four bytes cost nothing, and -inf, no tail,
        stays apart from a tail that is merely light.
        """
        lowest = torch.finfo(torch.float16).min
        return TopK(self.ids.int(), self.log_probs.clamp(min=lowest).half(), self.tail.float())

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.ids, self.log_probs, self.tail

    def to(self, device: torch.device | str) -> TopK:
        """On another device. The dtypes stay: DeepSpeed's loaders would round loose tensors to the training's."""
        return TopK(*(tensor.to(device) for tensor in self.tensors))

    def __len__(self) -> int:
        return len(self.tail)

    def __getitem__(self, part: slice) -> TopK:
        return TopK(*(tensor[part] for tensor in self.tensors))

    def comparison(
        self, student: Projected, rows: int, divergence: Divergence, temperature: float, kd_ratio: float
    ) -> Compare:
        """See `gkd.losses.targets.Target`. The log-probabilities held here are of that temperature."""
        options = {"divergence": divergence, "temperature": temperature, "kd_ratio": kd_ratio}

        def compare(raw, part, labels, statistics, gradient):
            def statistics_of(logits):
                return self[part].statistics_and_gradient(logits, labels, **options, gradient=gradient)

            return compare_in_torch(student, raw, statistics_of, statistics, gradient)

        return compare

    def logits(self, vocab_size: int, rows: int) -> None:
        """They are not kept."""

    @torch.no_grad()
    def statistics_and_gradient(
        self,
        student_logits: torch.Tensor,
        labels: torch.Tensor,
        divergence: Divergence,
        temperature: float = 1.0,
        kd_ratio: float = 1.0,
        gradient: bool = True,
    ) -> tuple[TokenStatistics, torch.Tensor | None]:
        """`gkd.losses.divergences.statistics_and_gradient` with this teacher.

        With c (n, k + 1) the gradient to the coarse distribution's logits, the gradient to the student's is c_j at
        token j of the k, and c_tail · p_i / p_tail at token i of the tail.

        Args:
            student_logits: (n, V), of any float dtype; they are left as they are.
            labels, divergence, temperature, kd_ratio: as there. The log-probabilities held here are of that temperature.

        Returns:
            The statistics, (n,) each: KLs and the teacher's entropy of the coarse distributions, the student's
            entropy of the whole; and the gradient (n, V), or None. In float32 (float64 for float64 logits).
        """
        work = torch.promote_types(student_logits.dtype, torch.float32)
        raw = student_logits.to(work)
        ids = self.ids.long()
        whole = F.log_softmax(raw if temperature == 1.0 else raw / temperature, dim=-1)  # (n, V) log p
        top = whole.gather(1, ids)
        agreement = (whole.argmax(-1) == ids[:, 0]).to(work)
        entropy = -whole.exp().mul_(whole).sum(-1)
        whole.scatter_(1, ids, -torch.inf)
        tail = whole.logsumexp(-1, keepdim=True).clamp_(min=_LOG_ZERO)  # (n, 1)
        student = torch.cat([top, tail], 1)  # (n, k + 1)
        teacher = torch.cat([self.log_probs.to(work), self.tail.to(work)[:, None].clamp(min=_LOG_ZERO)], 1)
        # Log-probabilities are logits of their distribution.
        coarse, coarse_grad = statistics_and_gradient(student, teacher, labels, divergence, gradient=gradient)
        grad = None
        if gradient:
            grad = whole.sub_(tail).exp_().mul_(coarse_grad[:, -1:]).scatter_(1, ids, coarse_grad[:, :-1])
            if temperature != 1.0:
                grad /= temperature
        loss = coarse.loss
        if kd_ratio < 1.0:
            loss = mix_cross_entropy(loss, grad, raw, labels, kd_ratio)
        return coarse._replace(loss=loss, student_entropy=entropy, agreement=agreement), grad
