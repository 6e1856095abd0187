"""The divergence from a teacher of which only the k likeliest tokens and the probability of all others are known.

Both distributions are coarsened to k + 1 buckets, the teacher's k tokens and the tail, whose divergence
`gkd.losses.divergences` computes exactly, without an assumption about the tail. Compared with the whole divergence:

* It is a lower bound: coarsening is a deterministic map, which increases no f-divergence (data processing inequality),
  and all choices of `--divergence` are f-divergences.
* It grows with k, since the buckets of k are unions of those of k + 1, and is the whole divergence at k = V.
* It leaves the student free within the tail: the gradient moves the tail's mass and keeps its shape.

The loss of information depends on whose probabilities weigh the log-ratios. At β = 0 they are the teacher's, and its
tail is light. At β = 1 they are the student's, whose tail is heavy as long as the student is far off: then little of
the divergence remains, and its gradient only drives mass out of the tail. Skew KLs and the total variation have the
same two sides. Measurements are in benchmarks/RESULTS.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gkd.losses.divergences import Divergence, TokenStatistics, log_softmax, mix_cross_entropy, statistics_and_gradient
from gkd.losses.projection import Projected, chunk_tokens
from gkd.losses.targets import Compare, Target
from gkd.models.heads import widened

# In place of log 0, so that 0 · (log 0 - log 0) is 0: its exponential is 0 even in float64.
_LOG_ZERO = -1e4
_ROUNDING = torch.finfo(torch.float32).eps  # of a mass near 1


@dataclass
class TopK:
    """The teacher's coarsened distribution at n positions.

    In float16 a log-probability l is off by at most |l| · 2^-11, so all probabilities together by entropy · 2^-11, about
    a thousandth. The buckets are normalised again at reading, which keeps KLs from falling below 0.

    Attributes:
        ids: int (n, k), the likeliest tokens, in falling order.
        log_probs: (n, k) of any float dtype, their log-probabilities.
        tail: (n,), the logarithm of the probability of all other tokens, -inf if there are none.
        following: (n,), the log-probability of the token that follows, where it is known: an evaluation needs it, and a student
            with another tokenizer.
        void: bool (n, k), of `merged` alone: no bucket stands there, and its id is another's too.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    tail: torch.Tensor
    following: torch.Tensor | None = None
    void: torch.Tensor | None = None

    @classmethod
    def of_logits(
        cls, logits: torch.Tensor, k: int, temperature: float = 1.0, next_ids: torch.Tensor | None = None
    ) -> TopK:
        """From logits (n, V), k <= V: int32 ids; the rest in float32 (float64 for float64 logits). `next_ids` (n,) follow."""
        log_probs = log_softmax(widened(logits), temperature)
        following = None if next_ids is None else log_probs.gather(1, next_ids[:, None])[:, 0]
        top, ids = log_probs.topk(k)  # sorted
        tail = log_probs.scatter_(1, ids, -torch.inf).logsumexp(-1)  # 1 - sum would cancel all digits
        return cls(ids.to(torch.int32), top, tail, following)

    @classmethod
    def of_likeliest(
        cls,
        ids: torch.Tensor,
        log_probs: torch.Tensor,
        vocab_size: int,
        following: torch.Tensor | None = None,
        named: torch.Tensor | None = None,
    ) -> TopK:
        """From the k likeliest of `vocab_size` ids alone, (n, k) in any order, as other programs tell them; in float32.

        The tail is what they leave of 1: off by what their log-probabilities round, 1e-7 or more, and no likelier an id than
        the last of the `named` (n,) likeliest of the k, by default all: the others are there to be k, and have no probability.
        """
        top, order = log_probs.double().clamp(min=_LOG_ZERO, max=0).sort(descending=True, stable=True)
        left = (1 - top.exp().sum(1)).clamp(min=_ROUNDING)  # it keeps no digit of a light tail
        named = top.new_full((len(top),), top.shape[1], dtype=torch.long) if named is None else named
        least = top.gather(1, named[:, None] - 1)[:, 0]
        left = left.minimum((vocab_size - named) * least.exp())
        return cls(ids.gather(1, order).int(), top.float(), left.log().float(), following)

    @classmethod
    def of_target(
        cls,
        target: Target,
        count: int,
        vocab_size: int,
        k: int,
        temperature: float,
        device: torch.device,
        next_ids: torch.Tensor | None = None,
    ) -> TopK:
        """From the `count` positions of a target, a chunk of logits at a time, in the dtypes of `stored`.

        A target that is a TopK already, of the same k and at the same temperature, is stored as it is.

        Args:
            next_ids: the token that follows each position, int64 (count,), for `following`.
        """
        if isinstance(target, TopK):
            return target.stored()
        rows = min(max(chunk_tokens(vocab_size, device.type) // 2, 16), max(count, 1))
        logits, known = target.logits(vocab_size, rows), []
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            of_part = None if next_ids is None else next_ids[part]
            known.append(cls.of_logits(logits(part), k, temperature, of_part).stored())
        return cls.joined(known or [cls.empty(k, with_following=next_ids is not None)])

    @classmethod
    def joined(cls, parts: Sequence[TopK]) -> TopK:
        """Of the positions of all parts; with `following` if all have it."""
        columns = [*zip(*(part.tensors for part in parts), strict=True)]
        if all(part.following is not None for part in parts):
            columns.append([part.following for part in parts])
        return cls(*map(torch.cat, columns))

    @classmethod
    def empty(cls, k: int, with_following: bool = False) -> TopK:
        """The TopK of no position, in the dtypes of `stored`."""
        following = torch.zeros(0) if with_following else None
        return cls(torch.zeros(0, k, dtype=torch.int32), torch.zeros(0, k).half(), torch.zeros(0), following)

    def stored(self) -> TopK:
        """In a cache's dtypes: log-probabilities in float16, clamped to its range (e^-65504 is 0), tail and `following` in float32.

        The tail's four bytes are few beside the 6 k bytes of the rest, and keep -inf (no tail) apart from a light tail.
        """
        lowest = torch.finfo(torch.float16).min
        following = None if self.following is None else self.following.clamp(min=_LOG_ZERO).float()
        return TopK(self.ids.int(), self.log_probs.clamp(min=lowest).half(), self.tail.float(), following)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The distribution, without `following`."""
        return self.ids, self.log_probs, self.tail

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TopK:
        more = (None if tensor is None else function(tensor) for tensor in (self.following, self.void))
        return TopK(*map(function, self.tensors), *more)

    def to(self, device: torch.device | str) -> TopK:
        """Moves to a device and keeps the dtypes: DeepSpeed's loaders cast plain tensors to the training's."""
        return self._map(lambda tensor: tensor.to(device))

    def __len__(self) -> int:
        return len(self.tail)

    def __getitem__(self, part: slice | torch.Tensor) -> TopK:
        return self._map(lambda tensor: tensor[part])

    def merged(self, class_of: torch.Tensor, classes: int) -> TopK:
        """The distribution over classes of ids: those of the k likeliest ids, and all else as the tail.

        A class has the probability of its members among the k; what others of its members have is in the tail. Where all
        classes are among the k, no bucket is left for the tail: it is left out. Members are compared with each other, (n, k, k), and not
        scattered, so that sums have the same bits each time.

        Args:
            class_of: of each id, int64 (V,); ids of class -1 are left out.
            classes: their number.
        """
        of_ids = class_of[self.ids.long()]  # (n, k)
        same = of_ids[:, :, None] == of_ids[:, None]
        log_probs = widened(self.log_probs)
        log_probs = log_probs[:, None].masked_fill(~same, -torch.inf).logsumexp(-1)
        void = same.tril(-1).any(-1) | (of_ids < 0)
        log_probs, order = log_probs.masked_fill(void, -torch.inf).sort(descending=True, stable=True)
        of_ids, void = of_ids.gather(1, order), void.gather(1, order)
        of_ids = torch.where(void, of_ids[:, :1].clamp(min=0), of_ids)
        tail = self.tail.masked_fill((~void).sum(1) == classes, -torch.inf)
        return TopK(of_ids, log_probs.clamp(min=_LOG_ZERO), tail, void=void)

    def comparison(
        self, student: Projected, rows: int, divergence: Divergence, temperature: float, kd_ratio: float
    ) -> Compare:
        """See `gkd.losses.targets.Target`. `log_probs` must be at the same temperature."""
        options = divergence, temperature, kd_ratio

        def compare(raw, part, labels, statistics, gradient):
            logits = student.finish(raw)
            values, grad = self[part].statistics_and_gradient(logits, labels, *options, gradient)
            statistics[:] = torch.stack(values)
            return student.head.to_raw(grad, logits) if gradient else None

        return compare

    def logits(self, vocab_size: int, rows: int) -> None:
        """None: the teacher's whole distribution is not known."""

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
        """`gkd.losses.divergences.statistics_and_gradient` with this teacher, whose `log_probs` are at `temperature`.

        With c (n, k + 1) the gradient to the logits of the coarse distribution, the gradient to the student's logits is
        c_j at token j of the k, and c_tail · p_i / p_tail at token i of the tail.

        KLs and the teacher's entropy are of the coarse distributions, the student's entropy is of the whole one.
        """
        raw = widened(student_logits)
        ids = self.ids.long()
        whole = log_softmax(raw, temperature)  # (n, V) log p
        top = whole.gather(1, ids)
        if self.void is not None:
            top.masked_fill_(self.void, _LOG_ZERO)
        agreement = (whole.argmax(-1) == ids[:, 0]).to(raw.dtype)
        entropy = -whole.exp().mul_(whole).sum(-1)
        whole.scatter_(1, ids, -torch.inf)
        tail = whole.logsumexp(-1, keepdim=True).clamp_(min=_LOG_ZERO)  # (n, 1)
        student = torch.cat([top, tail], 1)  # (n, k + 1)
        teacher = torch.cat([self.log_probs.to(raw.dtype), self.tail.to(raw.dtype)[:, None].clamp(min=_LOG_ZERO)], 1)
        # Log-probabilities are logits of their distribution.
        coarse, coarse_grad = statistics_and_gradient(student, teacher, labels, divergence, gradient=gradient)
        grad = None
        if gradient:
            slopes = coarse_grad[:, :-1]
            if self.void is not None:  # its id is the first one's
                slopes = torch.where(self.void, slopes[:, :1], slopes)
            grad = whole.sub_(tail).exp_().mul_(coarse_grad[:, -1:]).scatter_(1, ids, slopes)
        loss = mix_cross_entropy(coarse.loss, grad, raw, labels, temperature, kd_ratio)
        return coarse._replace(loss=loss, student_entropy=entropy, agreement=agreement), grad
