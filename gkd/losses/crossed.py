"""The divergence from a teacher with another tokenizer, over the tokens that both vocabularies have.

Each id of either vocabulary belongs to one class (`gkd.data.alignment.shared_classes`): a token that both have is one, and
the others are added to the shared token with which their text begins. The divergence is that of the two distributions over
classes. It is exact where all tokens are shared, and else a lower bound of the divergence over texts as far as these tell:
coarsening increases no f-divergence. All probability is counted, and the student is free within a class: the gradient moves
a class's mass and keeps its shape.

Distributions are compared at positions before which the same text stands. Between two of them the student may have several
tokens for what the teacher has no more tokens for. There the student's token is compared with what the teacher's probability of the
whole span leaves for it: the divergence of two buckets, this token and any other. Elsewhere the divergence is 0.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import torch

from gkd.data.alignment import Inner
from gkd.losses.divergences import Divergence, TokenStatistics, mix_cross_entropy, statistics_and_gradient
from gkd.losses.projection import Projected
from gkd.losses.targets import Compare, HiddenTarget
from gkd.losses.topk import TopK
from gkd.models.heads import widened

# The teacher is never surer of a token inside of a span than this log-probability: a reverse KL has no bound where it is sure.
_SURE = -1e-6


class Coarsening:
    """Sums a vocabulary's probabilities over classes.

    Sums are gathered by the size of the classes, not scattered, so that they have the same bits each time.

    Args:
        class_of: of each id, int64 (V,); -1 leaves an id out.
        classes: their number C, each with one id or more.
    """

    def __init__(self, class_of: torch.Tensor, classes: int):
        self.size, self.classes = len(class_of), classes
        order = class_of.argsort(stable=True)
        order = order[class_of[order] >= 0]
        counts = torch.bincount(class_of[order], minlength=classes)
        starts = counts.cumsum(0) - counts
        self._groups: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # classes (K,), ids and mask (K, w)
        for width in _widths(int(counts.max())):
            of_width = ((counts <= width) & (counts > width // 2)).nonzero()[:, 0]
            columns = torch.arange(width, device=class_of.device)
            inside = columns < counts[of_width, None]
            ids = order[starts[of_width, None] + torch.where(inside, columns, 0)]
            if len(of_width):
                self._groups.append((of_width, ids, inside))

    def sums(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) -> those of the classes, (n, C)."""
        coarse = logits.new_empty(len(logits), self.classes)
        for of_width, ids, inside in self._groups:
            coarse[:, of_width] = self._members(logits, ids, inside).logsumexp(-1)
        return coarse

    def spread(self, grad: torch.Tensor, logits: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
        """From the gradient to `coarse = sums(logits)`, (n, C), that to `logits`, (n, V)."""
        fine = torch.zeros_like(logits)
        for of_width, ids, inside in self._groups:
            shares = (self._members(logits, ids, inside) - coarse[:, of_width, None]).exp_()
            fine[:, ids[inside]] = (shares * grad[:, of_width, None])[:, inside]
        return fine

    @staticmethod
    def _members(logits: torch.Tensor, ids: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """The logits of each class's ids, (n, K, w), -inf where a class has fewer."""
        members = logits.index_select(1, ids.flatten()).unflatten(1, ids.shape)
        return members.masked_fill_(~inside, -torch.inf)


def _widths(largest: int) -> list[int]:
    """Powers of two up to the first that is `largest` or more."""
    return [2**power for power in range((largest - 1).bit_length() + 1)]


@dataclass
class ClassMaps:
    """Both vocabularies' classes, int64 (Vs,) and (Vt,), and their number."""

    student_classes: torch.Tensor
    teacher_classes: torch.Tensor
    classes: int

    @cached_property
    def student(self) -> Coarsening:
        return Coarsening(self.student_classes, self.classes)

    @cached_property
    def teacher(self) -> Coarsening:
        return Coarsening(self.teacher_classes, self.classes)


@dataclass
class Spans:
    """How the N scored positions are compared.

    Attributes:
        labels: the student's next token at each, int64 (N,).
        following: the token that follows the teacher's position, int64 (N,).
        aligned: bool (N,), where distributions are compared.
        inner: int8 (N,), see `gkd.data.alignment.Inner`.
    """

    labels: torch.Tensor
    following: torch.Tensor
    aligned: torch.Tensor
    inner: torch.Tensor

    def to(self, device: torch.device | str) -> "Spans":
        return Spans(*(getattr(self, field.name).to(device) for field in fields(self)))

    @cached_property
    def starts(self) -> torch.Tensor:
        """The position at which the span of each begins, (N,)."""
        places = torch.arange(len(self.aligned), device=self.aligned.device)
        return places.where(self.aligned, 0).cummax(0).values


@dataclass
class CrossedTarget:
    """A teacher with another vocabulary at N scored positions."""

    teacher: HiddenTarget
    maps: ClassMaps
    spans: Spans

    def comparison(
        self, student: Projected, rows: int, divergence: Divergence, temperature: float, kd_ratio: float
    ) -> Compare:
        """See `gkd.losses.targets.Target`. KLs, entropies and the agreement are those of the classes, 0 where these are not
        compared."""
        spelled = self.spelled(rows, temperature)  # first, since each holds a chunk of the teacher's logits
        read = self._teacher_logits(rows)

        def compare(raw, part, labels, statistics, gradient):
            fine = widened(student.finish(raw))
            scaled = fine if temperature == 1.0 else fine / temperature
            values, grad = self._classes_compared(scaled, read(part), part, divergence, temperature, gradient)
            divergences, slopes = values.loss, grad
            at = spelled.inside[part].nonzero()[:, 0]
            if len(at):
                known = TopK(labels[at, None], spelled.log_probs[part][at, None], spelled.others[part][at])
                of_token, grad = known.statistics_and_gradient(scaled[at], labels[at], divergence, gradient=gradient)
                divergences = divergences.index_copy(0, at, of_token.loss)
                slopes = slopes.index_copy_(0, at, grad) if gradient else None
            loss = mix_cross_entropy(divergences, slopes, fine, labels, temperature, kd_ratio)
            statistics[:] = torch.stack(values._replace(loss=loss))
            return student.head.to_raw(slopes, fine) if gradient else None

        return compare

    def _classes_compared(
        self,
        scaled: torch.Tensor,
        teacher_logits: torch.Tensor,
        part: slice,
        divergence: Divergence,
        temperature: float,
        gradient: bool,
    ) -> tuple[TokenStatistics, torch.Tensor | None]:
        """Statistics and the gradient to the student's logits over the temperature, `scaled` (n, V), where positions are
        aligned; else 0."""
        maps, compared = self.maps, self.spans.aligned[part].to(scaled.dtype)
        coarse = maps.student.sums(scaled)
        of_teacher = maps.teacher.sums(_over(teacher_logits, temperature).to(scaled.dtype))
        values, grad = statistics_and_gradient(
            coarse, of_teacher, self.spans.labels[part], divergence, gradient=gradient
        )
        if gradient:
            grad = maps.student.spread(grad.mul_(compared[:, None]), scaled, coarse)
        return TokenStatistics(*(value * compared for value in values)), grad

    def spelled(self, rows: int, temperature: float) -> "Spelled":
        """What the teacher says of the student's next token inside of spans, read at most `rows` positions at a time.

        The teacher's probability of a span is the product over its own tokens on it. The student's first token has there the
        probability of its class; the others have the same each, such that the student's product is that of the teacher.
        """
        spans, count = self.spans, len(self.spans.aligned)
        inside = spans.inner > 0
        wide = torch.promote_types(self.teacher.hidden.dtype, torch.float32)
        log_probs = torch.zeros(count, dtype=wide, device=inside.device)
        if not bool(inside.any()):
            return Spelled(inside, log_probs, log_probs)
        begins = torch.zeros_like(inside).index_fill_(0, spans.starts[inside], True)
        own, first = log_probs.clone(), log_probs.clone()  # of the teacher's next token; of the class of the student's
        places = (begins | (spans.inner == Inner.READS)).nonzero()[:, 0]
        read = HiddenTarget(self.teacher.hidden[places], self.teacher.head).logits(self.maps.teacher.size, rows)
        for start in range(0, len(places), rows):
            at = places[start : start + rows]
            scaled = _over(read(slice(start, start + rows)), temperature)
            total = scaled.logsumexp(-1)
            own[at] = (scaled.gather(1, spans.following[at, None])[:, 0] - total).to(wide)
            classes = self.maps.student_classes[spans.labels[at]]
            of_class = self.maps.teacher.sums(scaled).gather(1, classes.clamp(min=0)[:, None])[:, 0]
            first[at] = torch.where(classes < 0, -torch.inf, of_class - total).to(wide)
        inner_places = inside.nonzero()[:, 0]
        begin = spans.starts[inner_places]
        longest = int((inner_places - begin).max()) + 1
        members = (begin[:, None] + torch.arange(longest, device=begin.device)).clamp(max=count - 1)  # (I, w)
        of_span = spans.starts[members] == begin[:, None]
        span = own[members].masked_fill(~of_span, 0.0).sum(1)
        behind_first = of_span.sum(1) - 1
        known = first[begin].isfinite()
        log_probs[inner_places] = ((span - first[begin].where(known, 0.0)) / behind_first).clamp(max=_SURE)
        others = torch.zeros_like(log_probs).index_copy_(0, inner_places, log_probs[inner_places].expm1().neg().log())
        inside[inner_places] = known
        return Spelled(inside, log_probs, others)

    def measurement(
        self, rows: int, divergence: Divergence
    ) -> Callable[[torch.Tensor, slice, torch.Tensor], tuple[TokenStatistics, torch.Tensor]]:
        """A function from the student's logits (n, V) at at most `rows` positions, the positions and their labels to the
        statistics, and the share of the teacher's five likeliest classes that are among the student's, (n,); both 0 where
        classes are not compared."""
        read = self._teacher_logits(rows)

        def measure(logits, part, labels):
            coarse = self.maps.student.sums(logits)
            of_teacher = self.maps.teacher.sums(read(part).to(logits.dtype))
            basic, _ = statistics_and_gradient(coarse, of_teacher, labels, divergence, gradient=False)
            compared = self.spans.aligned[part].to(logits.dtype)
            count = min(5, self.maps.classes)
            best, best_of_teacher = (values.topk(count).indices for values in (coarse, of_teacher))
            top5 = (best[:, :, None] == best_of_teacher[:, None]).any(1).to(logits.dtype).mean(1)
            return TokenStatistics(*(value * compared for value in basic)), top5 * compared

        return measure

    def _teacher_logits(self, rows: int) -> Callable[[slice], torch.Tensor]:
        return self.teacher.logits(self.maps.teacher.size, rows)

    def logits(self, vocab_size: int, rows: int) -> None:
        """None: the teacher has no logits of the student's ids."""


@dataclass
class Spelled:
    """What the teacher says of the student's next token at N positions.

    Attributes:
        inside: bool (N,), where it says something.
        log_probs, others: (N,), the log-probabilities of the token and of all others.
    """

    inside: torch.Tensor
    log_probs: torch.Tensor
    others: torch.Tensor


def _over(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = widened(logits)
    return logits if temperature == 1.0 else logits / temperature
