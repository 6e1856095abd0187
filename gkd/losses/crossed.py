"""The divergence from a teacher with another tokenizer, over the tokens that both vocabularies have.

Each id of either vocabulary belongs to one class (`gkd.data.alignment.shared_classes`): a token that both have is one, and
the others are added to the shared token with which their text begins. The divergence is that of the two distributions over
classes. It is exact where all tokens are shared, and else a lower bound of the divergence over texts as far as these tell:
coarsening increases no f-divergence. All probability is counted, and the student is free within a class: the gradient moves
a class's mass and keeps its shape.

Distributions are compared at positions before which the same text stands. Between two of them the student may have several
tokens for what the teacher has no more tokens for. There the student's token is compared with what the teacher's probability of the
whole span leaves for it: the divergence of two buckets, this token and any other. And where a token of the student, which the
teacher lacks, is a span by itself, it is compared with the share of its class that the teacher's probability of the span is:
again two buckets, this token and the others of the class. Elsewhere the divergence is 0.

Both sides' logits exist for one chunk of positions at a time, and all copies of them together take no more than `chunk_tokens` leaves
for a chunk. What is kept of all positions is a few numbers each, and the teacher's hidden states.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property, partial
from itertools import pairwise

import torch

from gkd.losses.divergences import Divergence, TokenStatistics, mix_cross_entropy, statistics_and_gradient
from gkd.losses.projection import Projected
from gkd.losses.targets import Compare, HiddenTarget
from gkd.losses.topk import TopK
from gkd.models.heads import widened

# No token is surer than this log-probability, where it stands against all others: a reverse KL has no bound there.
_SURE = -1e-6


class Coarsening:
    """Sums a vocabulary's probabilities over classes.

    Sums are gathered by the size of the classes, not scattered, so that they have the same bits each time. Ids are int32, with
    which a gather takes half the time on a CPU.

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
        # Ids by class, and how many each class has, and where they begin.
        self._ids, self._counts, self._starts = order, counts, starts
        self._class_of, self._left_out = class_of.clamp(min=0).int(), (class_of < 0).nonzero()[:, 0]
        self._first = order[starts].int()  # (C,) the first id of each class, which most have alone
        # The ids of larger classes, (m,), int64, which a copy takes, and int32; and their classes.
        self._members = ((class_of >= 0) & (counts[class_of.clamp(min=0)] > 1)).nonzero()[:, 0]
        self._members_read, self._class_of_members = self._members.int(), self._class_of[self._members]
        # Larger classes (K,); their ids (w · K,); and which of these are none, (w, K), or None.
        self._groups: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        for below, width in pairwise(_widths(int(counts.max()))):
            of_width = ((counts <= width) & (counts > below)).nonzero()[:, 0]
            columns = torch.arange(width, device=class_of.device)[:, None]
            inside = columns < counts[of_width]
            ids = order[starts[of_width] + torch.where(inside, columns, 0)].flatten().int()
            if len(of_width):
                self._groups.append((of_width, ids, None if bool(inside.all()) else ~inside))

    def sums(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) -> those of the classes, (n, C)."""
        coarse = logits.index_select(1, self._first)
        for of_width, ids, outside in self._groups:
            members = logits.index_select(1, ids).unflatten(1, (-1, len(of_width)))  # (n, w, K)
            if outside is not None:
                members.masked_fill_(outside, -torch.inf)
            both = members.shape[1] == 2
            total = torch.logaddexp(members[:, 0], members[:, 1]) if both else members.logsumexp(1)
            coarse.index_copy_(1, of_width, total)
        return coarse

    def one(self, logits: torch.Tensor, totals: torch.Tensor, at: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """The log-probability of a class, (m,), -1 of none, at each of some rows `at` (m,) of logits (n, V), of which `totals` (n,) are the
        `logsumexp`; -inf of none."""
        counts = self._counts[classes].where(classes >= 0, 0)[:, None]
        columns = torch.arange(int(counts.max()) if len(at) else 0, device=at.device)
        inside = columns < counts
        ids = self._ids[(self._starts[classes][:, None] + columns).where(inside, 0)]
        members = logits[at[:, None], ids].masked_fill_(~inside, -torch.inf)
        if len(self._left_out):
            totals = logits.index_fill(1, self._left_out, -torch.inf).logsumexp(1)
        return members.logsumexp(1) - totals[at]

    def spread(self, grad: torch.Tensor, logits: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
        """From the gradient to `coarse = sums(logits)`, (n, C), that to `logits`, (n, V)."""
        fine = grad.index_select(1, self._class_of).index_fill_(1, self._left_out, 0.0)
        shares = logits.index_select(1, self._members_read).sub_(coarse.index_select(1, self._class_of_members)).exp_()
        return fine.index_copy_(1, self._members, shares.mul_(grad.index_select(1, self._class_of_members)))


def _widths(largest: int) -> list[int]:
    """1 to 4, then powers of two up to the first that is `largest` or more."""
    return [1, 2, 3, *(2**power for power in range(2, max((largest - 1).bit_length(), 2) + 1))]


@dataclass
class ClassMaps:
    """Both vocabularies' classes.

    Attributes:
        student_classes, teacher_classes: of each id, int64 (Vs,) and (Vt,); see `Coarsening`.
        classes: their number.
        lacking: bool (Vs,), the student's tokens that the teacher's vocabulary lacks.
    """

    student_classes: torch.Tensor
    teacher_classes: torch.Tensor
    classes: int
    lacking: torch.Tensor

    @cached_property
    def student(self) -> Coarsening:
        return Coarsening(self.student_classes, self.classes)

    @cached_property
    def teacher(self) -> Coarsening:
        return Coarsening(self.teacher_classes, self.classes)


@dataclass
class Spans:
    """How the N scored positions are compared with a teacher's M.

    Attributes:
        labels: the student's next token at each of N, int64 (N,).
        at: the teacher's position at the same place, or where the span begins, int64 (N,) below M.
        following: the teacher's next token at each of M, int64 (M,).
        aligned: bool (N,), where a span begins: distributions are compared.
        lengths: int16 (N,), the teacher's tokens on the span; 0 if that is not known.
    """

    labels: torch.Tensor
    at: torch.Tensor
    following: torch.Tensor
    aligned: torch.Tensor
    lengths: torch.Tensor

    def members(self, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's positions of each span that begins at `starts` (S,), (S, w), and which are any, bool."""
        lengths = self.lengths[starts, None]
        columns = torch.arange(int(lengths.max()), device=starts.device)
        return (self.at[starts, None] + columns).where(columns < lengths, 0), columns < lengths

    def to(self, device: torch.device | str) -> "Spans":
        return Spans(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass
class Spelled:
    """What the teacher says of the student's next token itself, at N positions.

    Attributes:
        inside: bool (N,), inside of a span: `log_probs` are of the token behind those before it.
        whole: bool (N,), where a token that the teacher lacks is a whole span: `log_probs` are of its share of its class.
        log_probs: (N,), log-probabilities; 0 elsewhere.
    """

    inside: torch.Tensor
    whole: torch.Tensor
    log_probs: torch.Tensor


# (student's logits of the classes (n, C), the positions `part`, their labels, divergence, gradient) -> statistics, and the
# gradient to those logits, or None without `gradient`.
CompareClasses = Callable[
    [torch.Tensor, slice, torch.Tensor, Divergence, bool], tuple[TokenStatistics, torch.Tensor | None]
]


class AcrossVocabularies:
    """A teacher with another vocabulary, and how the student's N positions are compared with it.

    Attributes:
        maps: both vocabularies' classes.
        labels, aligned: of the N positions, see `Spans`.
    """

    maps: ClassMaps
    labels: torch.Tensor
    aligned: torch.Tensor

    def classes(self, rows: int, temperature: float) -> CompareClasses:
        """A function that compares distributions over classes, at most `rows` positions at a time."""
        raise NotImplementedError

    def spelled(self, rows: int, temperature: float) -> Spelled:
        """What the teacher says of the student's tokens by the chain rule."""
        raise NotImplementedError

    def comparison(
        self, student: Projected, rows: int, divergence: Divergence, temperature: float, kd_ratio: float
    ) -> Compare:
        """See `gkd.losses.targets.Target`. KLs, entropies and the agreement are those of the classes, 0 where these are not
        compared."""
        spelled = self.spelled(rows, temperature)  # first, since each holds a chunk of the teacher's logits
        compare_classes = self.classes(rows, temperature)

        def compare(raw, part, labels, statistics, gradient):
            fine = widened(student.finish(raw))
            scaled = fine if temperature == 1.0 else fine / temperature
            values, divergences, grad = self._where_spans_begin(
                scaled, compare_classes, part, spelled, divergence, gradient
            )
            at = spelled.inside[part].nonzero()[:, 0]
            if len(at):
                log_probs = spelled.log_probs[part][at].to(scaled.dtype)
                known = TopK(labels[at, None], log_probs[:, None], _log_rest(log_probs))
                of_token, slopes = known.statistics_and_gradient(scaled[at], labels[at], divergence, gradient=gradient)
                divergences.index_copy_(0, at, of_token.loss)
                if gradient:
                    grad.index_copy_(0, at, slopes)
            loss = mix_cross_entropy(divergences, grad, fine, labels, temperature, kd_ratio)
            statistics[:] = torch.stack(values._replace(loss=loss))
            return student.head.to_raw(grad, fine) if gradient else None

        return compare

    def _where_spans_begin(
        self,
        scaled: torch.Tensor,
        compare_classes: CompareClasses,
        part: slice,
        spelled: Spelled,
        divergence: Divergence,
        gradient: bool,
    ) -> tuple[TokenStatistics, torch.Tensor, torch.Tensor | None]:
        """Statistics, the divergence (n,), and its gradient to the student's logits over the temperature, `scaled` (n, V),
        where a span begins; else 0."""
        student, labels = self.maps.student, self.labels[part]
        compared = self.aligned[part].to(scaled.dtype)
        coarse = student.sums(scaled)
        values, grad = compare_classes(coarse, part, labels, divergence, gradient)
        values = TokenStatistics(*(value * compared for value in values))
        divergences = values.loss.clone()
        # Of a token that is a class's other than by name: whether it is this one, if it is one of the class.
        at = spelled.whole[part].nonzero()[:, 0]
        label = labels[at, None]
        own = self.maps.student_classes[label]
        # Relative to the class, since beside a large logit _SURE would be lost to rounding.
        token = (scaled[at].gather(1, label) - coarse[at].gather(1, own)).clamp(max=_SURE)
        rest = _log_rest(token)
        share = spelled.log_probs[part][at, None].to(scaled.dtype).clamp(max=_SURE)
        two = torch.cat([token, rest], 1), torch.cat([share, _log_rest(share)], 1)
        of_token, slopes = statistics_and_gradient(*two, labels[at], divergence, gradient=gradient)
        divergences.index_add_(0, at, of_token.loss)
        if not gradient:
            return values, divergences, None
        grad.mul_(compared[:, None])
        slope = grad[at].gather(1, own) * token.exp() + slopes[:, :1]
        # `spread` shares a slope out over the whole class.
        others = grad[at].scatter_add(1, own, slopes[:, 1:] * rest.neg().exp())
        grad = student.spread(grad.index_copy_(0, at, others), scaled, coarse)
        grad[at, label[:, 0]] = slope[:, 0]
        return values, divergences, grad

    def logits(self, vocab_size: int, rows: int) -> None:
        """None: the teacher has no logits of the student's ids."""


# (positions (m,) of the teacher's M, which of them begin spans (m,), the classes (S,) of the student's first tokens there) ->
# log-probabilities of the teacher's next tokens at all m, and of the classes at the beginnings, (S,), -inf where that is not known.
Told = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def spelled_by(told: Told, spans: Spans, maps: ClassMaps, dtype: torch.dtype) -> Spelled:
    """What the teacher says of the student's tokens by the chain rule.

    The teacher's probability of a span is the product over its own tokens on it. The student's first token has there the
    probability of its class; the others have the same each, such that the student's product is that of the teacher.
    """
    count = len(spans.aligned)
    places = torch.arange(count, device=spans.at.device)
    begin = places.where(spans.aligned, 0).cummax(0).values  # (N,) of each one's span
    length = torch.bincount(begin, minlength=count)[begin]  # the student's tokens on it
    several = (spans.lengths > 0) & ((length > 1) | (spans.lengths > 1))
    starts = (several & spans.aligned).nonzero()[:, 0]  # (S,)
    log_probs, of_first = (torch.zeros(count, dtype=dtype, device=begin.device) for _ in range(2))
    if not len(starts):
        return Spelled(several, several, log_probs)
    members, on_span = spans.members(starts)
    begins = torch.zeros_like(on_span).index_fill_(1, on_span.new_zeros(1, dtype=torch.long), True)[on_span]
    of_token, of_class = told(members[on_span], begins, maps.student_classes[spans.labels[starts]])
    of_first[starts] = of_class.to(dtype)
    whole = torch.zeros(members.shape, dtype=dtype, device=begin.device)
    whole = whole.masked_scatter_(on_span, of_token.to(dtype)).sum(1)
    of_span = torch.zeros_like(log_probs).index_copy_(0, starts, whole)
    known = several & of_first[begin].isfinite()
    inside, alone = known & ~spans.aligned, known & (length == 1) & maps.lacking[spans.labels]
    behind_first = (of_span - of_first)[begin]
    each = (behind_first / (length - 1).clamp(min=1)).clamp(max=_SURE)
    return Spelled(inside, alone, torch.where(inside, each, torch.where(alone, behind_first, 0.0)))


@dataclass
class CrossedTarget(AcrossVocabularies):
    """A teacher of which at its own M positions the hidden states are known."""

    teacher: HiddenTarget
    maps: ClassMaps
    spans: Spans

    @property
    def labels(self) -> torch.Tensor:
        return self.spans.labels

    @property
    def aligned(self) -> torch.Tensor:
        return self.spans.aligned

    def classes(self, rows: int, temperature: float) -> CompareClasses:
        read = self._teacher_logits(rows)

        def compare_classes(coarse, part, labels, divergence, gradient):
            of_teacher = self.maps.teacher.sums(over(read(part), temperature).to(coarse.dtype))
            return statistics_and_gradient(coarse, of_teacher, labels, divergence, gradient=gradient)

        return compare_classes

    def spelled(self, rows: int, temperature: float) -> Spelled:
        """See `spelled_by`; the teacher is read at most `rows` positions at a time."""
        dtype = torch.promote_types(self.teacher.hidden.dtype, torch.float32)
        return spelled_by(partial(self._log_probs, rows, temperature), self.spans, self.maps, dtype)

    def _log_probs(
        self, rows: int, temperature: float, members: torch.Tensor, begins: torch.Tensor, classes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Told`."""
        of_token, of_class, done = [], [], 0
        for part, scaled in self._read(members, rows, temperature):
            totals, at = scaled.logsumexp(1), begins[part].nonzero()[:, 0]
            of_token.append(self._of_following(scaled, totals, members[part]))
            of_class.append(self.maps.teacher.one(scaled, totals, at, classes[done : done + len(at)]))
            done += len(at)
        return torch.cat(of_token), torch.cat(of_class)

    def followed(self, at: torch.Tensor, rows: int, temperature: float) -> torch.Tensor:
        """The teacher's log-probabilities of its next tokens at `at` (m,) of its positions, m > 0, read at most `rows` at a
        time."""
        parts = self._read(at, rows, temperature)
        return torch.cat([self._of_following(scaled, scaled.logsumexp(1), at[part]) for part, scaled in parts])

    def _of_following(self, scaled: torch.Tensor, totals: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return scaled.gather(1, self.spans.following[at, None])[:, 0] - totals

    def _read(self, at: torch.Tensor, rows: int, temperature: float) -> Iterator[tuple[slice, torch.Tensor]]:
        """The teacher's logits over the temperature at `at` (m,) of its positions, at most `rows` at a time."""
        logits = HiddenTarget(self.teacher.hidden[at], self.teacher.head).logits(self.maps.teacher.size, rows)
        for start in range(0, len(at), rows):
            part = slice(start, start + rows)
            yield part, over(logits(part), temperature)

    def measurement(
        self, rows: int, divergence: Divergence
    ) -> Callable[[torch.Tensor, slice, torch.Tensor], tuple[TokenStatistics, torch.Tensor, torch.Tensor]]:
        """A function from the student's logits (n, V) at at most `rows` positions, the positions and their labels to the
        statistics; the share of the teacher's five likeliest classes that are among the student's, (n,); and what the span
        costs the teacher in nats by the chain rule, (n,). All are 0 where no span begins."""
        spans = self.spans
        starts = (spans.aligned & (spans.lengths > 0)).nonzero()[:, 0]
        wide = torch.promote_types(self.teacher.hidden.dtype, torch.float32)
        costs = torch.zeros(len(spans.aligned), dtype=wide, device=starts.device)
        if len(starts):
            members, on_span = spans.members(starts)
            own = self.followed(members[on_span], rows, 1.0).to(wide)
            costs[starts] = -costs.new_zeros(members.shape).masked_scatter_(on_span, own).sum(1)
        read = self._teacher_logits(rows)

        def measure(logits, part, labels):
            coarse = self.maps.student.sums(logits)
            of_teacher = self.maps.teacher.sums(read(part).to(logits.dtype))
            basic, _ = statistics_and_gradient(coarse, of_teacher, labels, divergence, gradient=False)
            compared = self.spans.aligned[part].to(logits.dtype)
            count = min(5, self.maps.classes)
            best, best_of_teacher = (values.topk(count).indices for values in (coarse, of_teacher))
            top5 = (best[:, :, None] == best_of_teacher[:, None]).any(1).to(logits.dtype).mean(1)
            return TokenStatistics(*(value * compared for value in basic)), top5 * compared, costs[part]

        return measure

    def _teacher_logits(self, rows: int) -> Callable[[slice], torch.Tensor]:
        """From at most `rows` of the N positions to the teacher's logits."""
        return HiddenTarget(self.teacher.hidden[self.spans.at], self.teacher.head).logits(self.maps.teacher.size, rows)


def over(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits over the temperature, in fp32 at least."""
    logits = widened(logits)
    return logits if temperature == 1.0 else logits / temperature


def _log_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """log(1 - p)."""
    return log_probs.expm1().neg().log()
