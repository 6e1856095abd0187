"""The loss of TRL's GOLD trainer on a teacher with another tokenizer, as a baseline for `gkd.losses.crossed`.

Universal Logit Distillation (arXiv 2402.12030) compares what two vocabularies do not share by rank: the L1 distance of both
sides' probabilities, each sorted. GOLD adds two things. Tokens of one name are compared by the divergence in place of their
ranks. And where several tokens of a side stand for one or more of the other, their distributions are merged: that of the last
token times the probabilities of those before it, by the chain rule ("bayesian" in TRL).

Deviations from TRL's `trl.experimental.gold.gold_trainer.ULDLoss` with `uld_use_hybrid_loss`, `use_extended_uld` and
`uld_token_merge_strategy="bayesian"`, numbered:

1. Tokens are the same if they write the same bytes, or have the same role if they are special; in TRL if they have the same
   string. For two byte-level tokenizers that is the same.
2. The loss is a sum over spans, divided as all losses here by the number of scored tokens of a step; TRL averages over the
   spans of a row, then over rows. So a long answer counts more.
3. The token that ends an answer is a span too. TRL leaves out the last token of a row by default (`uld_skip_student_eos`): this one,
   or what the chat template writes behind it.
4. Tokens behind the last common boundary are left out; TRL compares them as one last span, though they write different texts.
   So is a span of more tokens than a chunk of logits has positions, 16 at least.
5. Of a padded vocabulary only the tokenizer's ids are compared, and count for the weights.
6. The cross-entropy is mixed in by `--kd_ratio`, and temperatures are one, `--loss_temperature`.

As in TRL neither part need be 0 for equal texts, nor is the first part a divergence: probabilities of the tokens that both have
do not sum to 1. The weights are TRL's default: of the first part the share of the teacher's vocabulary that both have.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gkd.losses.crossed import CrossedTarget, over
from gkd.losses.divergences import Divergence, TokenStatistics, mix_cross_entropy
from gkd.losses.projection import Projected
from gkd.losses.targets import Compare, HiddenTarget
from gkd.models.heads import widened

_LEAST = math.log(1e-8)  # TRL's bound of log-probabilities


def sorted_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The L1 distance of two lists of probabilities, each sorted, the shorter filled up with zeros. (S, a), (S, b) -> (S,)

    It is 0 if one of them has no member, as in TRL.
    """
    count = min(student.shape[1], teacher.shape[1])
    if not count:
        return student.new_zeros(len(student))
    best, best_of_teacher = (side.topk(count).values for side in (student, teacher))
    longer, top = (student, best) if student.shape[1] > count else (teacher, best_of_teacher)
    return (best - best_of_teacher).abs().sum(1) + (longer.sum(1) - top.sum(1))


def hybrid_loss(
    log_student: torch.Tensor, log_teacher: torch.Tensor, matched: torch.Tensor, divergence: Divergence
) -> torch.Tensor:
    """GOLD's loss of S spans, (S,), with a graph to `log_student`.

    Args:
        log_student, log_teacher: log-probabilities of the spans' last tokens, (S, Vs) and (S, Vt), each with those of the tokens
            before it in the span added.
        matched: int64 (2, M), the ids of the tokens that both have.
    """
    sides = list(zip((log_student, log_teacher), matched, strict=True))
    common = (log.index_select(1, ids).clamp(min=_LEAST) for log, ids in sides)
    alone = (log.index_select(1, _others(ids, log.shape[1])).exp() for log, ids in sides)
    weight = matched.shape[1] / log_teacher.shape[1]
    return weight * divergence.value(*common) + (1 - weight) * sorted_distance(*alone)


def _others(ids: torch.Tensor, size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bool, device=ids.device).index_fill_(0, ids, False).nonzero()[:, 0]


def _before_last(log_probs: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The sum over each span's tokens but the last, (S,); `log_probs` (n,), spans by their starts and lengths (S,)."""
    columns = torch.arange(max(int(lengths.max()) - 1, 0), device=starts.device)
    inside = columns < lengths[:, None] - 1
    members = (starts[:, None] + columns).where(inside, 0)
    return log_probs.clamp(min=_LEAST)[members].masked_fill(~inside, 0.0).sum(1)


@dataclass
class UldTarget(CrossedTarget):
    """A teacher with another vocabulary, with which GOLD compares. An evaluation measures classes, as of a `CrossedTarget`.

    Attributes:
        matched: int64 (2, M), the student's and the teacher's ids of the tokens that both have.
    """

    matched: torch.Tensor

    unknown = tuple(name for name in TokenStatistics._fields if name != "loss")

    def parts(self, rows: int) -> Iterator[slice]:
        """The N positions in parts of at most `rows` that cut no span, unless it is longer than `rows`."""
        starts, count = self.spans.aligned.nonzero()[:, 0].tolist(), len(self.spans.aligned)
        start, end = 0, 0
        for boundary in [*starts, count]:
            if boundary - start > rows and end > start:
                yield slice(start, end)
                start = end
            while boundary - start > rows:
                yield slice(start, start + rows)
                start += rows
            end = boundary
        if count > start:
            yield slice(start, count)

    def comparison(
        self, student: Projected, rows: int, divergence: Divergence, temperature: float, kd_ratio: float
    ) -> Compare:
        """See `gkd.losses.targets.Target`. Of the statistics only the loss is known. A span's is at its last token."""
        spans, count = self.spans, len(self.spans.aligned)
        starts = spans.aligned.nonzero()[:, 0]  # (S,)
        lengths = starts.diff(append=starts.new_full((1,), count))
        kept = (spans.lengths[starts] > 0) & (lengths <= rows)
        starts, lengths = starts[kept], lengths[kept]
        own_starts, own_lengths = spans.at[starts], spans.lengths[starts].long()
        before = self._before(own_starts, own_lengths, rows, temperature)  # (S,)
        last = HiddenTarget(self.teacher.hidden[own_starts + own_lengths - 1], self.teacher.head)
        read = last.logits(self.maps.teacher.size, rows)

        def values_of(scaled: torch.Tensor, part: slice, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """The last positions of the part's spans, (s,), and their losses with a graph to `scaled` (n, V)."""
            edges = torch.tensor([part.start, part.start + len(scaled)], device=starts.device)
            spans_of_part = slice(*torch.searchsorted(starts, edges).tolist())
            begin, length = starts[spans_of_part] - part.start, lengths[spans_of_part]
            ends = begin + length - 1
            if not len(ends):
                return ends, scaled.sum(1)[:0]
            log_probs = scaled.log_softmax(-1)
            own = _before_last(log_probs.gather(1, labels[:, None])[:, 0], begin, length)
            of_teacher = over(read(spans_of_part), temperature).to(scaled.dtype).log_softmax(-1)
            of_teacher += before[spans_of_part, None].to(scaled.dtype)
            return ends, hybrid_loss(log_probs[ends] + own[:, None], of_teacher, self.matched, divergence)

        def compare(raw, part, labels, statistics, gradient):
            fine = widened(student.finish(raw))
            scaled = (fine if temperature == 1.0 else fine / temperature).detach().requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                ends, values = values_of(scaled, part, labels)
            grad = None
            if gradient:
                ones = torch.ones_like(values)
                grad = torch.autograd.grad(values, scaled, ones)[0] if len(ends) else torch.zeros_like(scaled)
            losses = scaled.new_zeros(len(raw)).index_copy_(0, ends, values.detach())
            statistics.zero_()
            statistics[0] = mix_cross_entropy(losses, grad, fine.detach(), labels, temperature, kd_ratio)
            return student.head.to_raw(grad, fine) if gradient else None

        return compare

    def _before(self, starts: torch.Tensor, lengths: torch.Tensor, rows: int, temperature: float) -> torch.Tensor:
        """The teacher's log-probability of its tokens on spans but the last of each, (S,), read at most `rows` at a time."""
        wide = torch.promote_types(self.teacher.hidden.dtype, torch.float32)
        log_probs = torch.zeros(len(self.spans.following), dtype=wide, device=starts.device)
        if not len(starts):
            return log_probs[:0]
        columns = torch.arange(int(lengths.max()), device=starts.device)
        read = (starts[:, None] + columns)[columns < lengths[:, None] - 1]  # positions of the M
        if len(read):
            log_probs[read] = self.followed(read, rows, temperature).to(wide)
        return _before_last(log_probs, starts, lengths)
