"""The divergence from a teacher with another tokenizer of which only the likeliest tokens are known, and the probability of all
others: `gkd.losses.crossed` with what `gkd.losses.topk` has of the teacher.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from gkd.losses.crossed import AcrossVocabularies, ClassMaps, CompareClasses, Spans, Spelled, spelled_by
from gkd.losses.topk import TopK
from gkd.models.heads import widened


@dataclass
class CrossedTopK(AcrossVocabularies):
    """A teacher of which the k likeliest of its own ids are known, and the probability of all others.

    Distributions are compared over the classes of those ids, and all else as one bucket, see `gkd.losses.topk.TopK.merged`.
    Exact are the student's side and the teacher's probability of a whole span. The teacher's probability of a class lacks what ids of
    the class have that are not among the k, which is in the bucket of all else: of both together at most the tail's mass stands in
    another bucket than it should. At k = all ids nothing does. Where the tail has more than is known of the class of the
    student's first token of a span, nothing is compared behind it.

    Attributes:
        known: of the student's N positions, at the temperature of the comparison: where a span begins the teacher's
            distribution, and as `following` what `Spelled.log_probs` are, NaN where nothing is known.
    """

    known: TopK
    maps: ClassMaps
    labels: torch.Tensor
    aligned: torch.Tensor

    @staticmethod
    def known_at(own: TopK, spans: Spans, maps: ClassMaps) -> TopK:
        """`known`, from the distributions at the teacher's own M positions, with `following`.

        `spans.at` may be M where the teacher is not known: there no span may begin.
        """
        dtype = torch.promote_types(own.following.dtype, torch.float32)
        spelled = spelled_by(partial(_told_by, own, spans.following, maps.teacher_classes), spans, maps, dtype)
        following = spelled.log_probs.masked_fill(~(spelled.inside | spelled.whole), torch.nan)
        spare = TopK(*(tensor.new_zeros(1, *tensor.shape[1:]) for tensor in own.tensors))
        return replace(TopK.joined([replace(own, following=None), spare])[spans.at], following=following)

    def classes(self, rows: int, temperature: float) -> CompareClasses:
        def compare_classes(coarse, part, labels, divergence, gradient):
            known = self.known[part].merged(self.maps.teacher_classes, self.maps.classes)
            return known.statistics_and_gradient(coarse, labels, divergence, gradient=gradient)

        return compare_classes

    def spelled(self, rows: int, temperature: float) -> Spelled:
        told = ~self.known.following.isnan()
        return Spelled(told & ~self.aligned, told & self.aligned, self.known.following.nan_to_num(0.0))


def _told_by(
    own: TopK,
    following: torch.Tensor,
    class_of: torch.Tensor,
    members: torch.Tensor,
    begins: torch.Tensor,
    classes: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Told`. A class has the probability of its members among the k, and of the token that follows; it is not known where
    the tail has more, which may be the class's."""
    at = members[begins]
    known, token = own[at], following[at, None]
    log_probs = widened(known.log_probs)
    # Of what is known that stands in a class: an id in none has no share.
    placed = log_probs.masked_fill(class_of[known.ids.long()] < 0, -torch.inf)
    total = torch.cat([placed, known.tail[:, None]], 1).logsumexp(1)
    # The token itself is known better than among the k, and has to have its place in its class.
    log_probs = torch.cat([log_probs.masked_fill(known.ids == token, -torch.inf), known.following[:, None]], 1)
    of_ids = class_of[torch.cat([known.ids.long(), token], 1)]
    others = (of_ids != classes[:, None]) | (of_ids < 0)
    mass = log_probs.masked_fill(others, -torch.inf).logsumexp(1)
    mass = mass.masked_fill(mass < known.tail, -torch.inf)
    return own.following[members], mass - total
