"""The divergence from a teacher with another tokenizer, over the tokens that both vocabularies have.

Each id of either vocabulary belongs to one class (`gkd.data.alignment.shared_classes`): a token that both have is one, and
the others are added to the shared token with which their text begins. The divergence is that of the two distributions over
classes. It is exact where all tokens are shared, and else a lower bound of the divergence over texts as far as these tell:
coarsening increases no f-divergence. All probability is counted, and the student is free within a class: the gradient moves
a class's mass and keeps its shape.

The tokens at two positions are compared if the same text stands before them. Elsewhere the divergence is 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from gkd.losses.divergences import Divergence, TokenStatistics, mix_cross_entropy, statistics_and_gradient
from gkd.losses.projection import Projected
from gkd.losses.targets import Compare, HiddenTarget
from gkd.models.heads import widened


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
class CrossedTarget:
    """A teacher with another vocabulary at N scored positions, of which the `aligned` (N,) are compared."""

    teacher: HiddenTarget
    maps: ClassMaps
    aligned: torch.Tensor

    def comparison(
        self, student: Projected, rows: int, divergence: Divergence, temperature: float, kd_ratio: float
    ) -> Compare:
        """See `gkd.losses.targets.Target`. KLs, entropies and the agreement are those of the classes, 0 where nothing is
        compared."""
        read = self._teacher_logits(rows)

        def compare(raw, part, labels, statistics, gradient):
            logits = student.finish(raw)
            values, grad = self._compare(logits, read(part), part, labels, divergence, temperature, kd_ratio, gradient)
            statistics[:] = torch.stack(values)
            return student.head.to_raw(grad, logits) if gradient else None

        return compare

    def measurement(
        self, rows: int, divergence: Divergence
    ) -> Callable[[torch.Tensor, slice, torch.Tensor], tuple[TokenStatistics, torch.Tensor]]:
        """A function from the student's logits (n, V) at at most `rows` positions, the positions and their labels to the
        statistics, and the share of the teacher's five likeliest classes that are among the student's, (n,)."""
        read = self._teacher_logits(rows)

        def measure(logits, part, labels):
            coarse = self.maps.student.sums(logits)
            coarse_teacher = self.maps.teacher.sums(read(part).to(logits.dtype))
            basic, _ = statistics_and_gradient(coarse, coarse_teacher, labels, divergence, gradient=False)
            compared = self.aligned[part].to(logits.dtype)
            count = min(5, self.maps.classes)
            best, best_of_teacher = (values.topk(count).indices for values in (coarse, coarse_teacher))
            top5 = (best[:, :, None] == best_of_teacher[:, None]).any(1).to(logits.dtype).mean(1)
            return TokenStatistics(*(value * compared for value in basic)), top5 * compared

        return measure

    def _teacher_logits(self, rows: int) -> Callable[[slice], torch.Tensor]:
        return self.teacher.logits(self.maps.teacher.size, rows)

    def _compare(self, logits, teacher_logits, part, labels, divergence, temperature, kd_ratio, gradient):
        """`gkd.losses.divergences.statistics_and_gradient` at the positions `part` of the student's logits (n, V)."""
        maps, compared = self.maps, self.aligned[part].to(torch.float32)
        fine = widened(logits)
        scaled = fine if temperature == 1.0 else fine / temperature
        coarse = maps.student.sums(scaled)
        coarse_teacher = maps.teacher.sums(widened(teacher_logits) / temperature)
        values, grad = statistics_and_gradient(coarse, coarse_teacher, labels, divergence, gradient=gradient)
        values = TokenStatistics(*(value * compared for value in values))
        if gradient:
            grad = maps.student.spread(grad.mul_(compared[:, None]), scaled, coarse)
        return values._replace(loss=mix_cross_entropy(values.loss, grad, fine, labels, temperature, kd_ratio)), grad

    def logits(self, vocab_size: int, rows: int) -> None:
        """None: the teacher has no logits of the student's ids."""
