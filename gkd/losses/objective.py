"""The objective of training and evaluation: the divergence of student and teacher at scored positions."""

import pkgutil
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from gkd.losses.divergences import Divergence, statistics_and_gradient
from gkd.losses.fused import distillation_loss
from gkd.losses.projection import Projected, chunk_tokens
from gkd.losses.targets import Target
from gkd.metrics.divergences import DIVERGENCES
from gkd.models.heads import LogitHead

_TOP = 5


def divergence_of(args: Any) -> Divergence:
    """The divergence that the flags choose: --divergence, with --beta or --skew_alpha."""
    kind = DIVERGENCES[args.divergence]
    settings = [] if kind.flag is None else [getattr(args, kind.flag)]
    return pkgutil.resolve_name(kind.made_by)(*settings)


class EvaluationStatistics(NamedTuple):
    """The metrics of each scored token, fp32 (N,), always at temperature 1. KLs, entropies and NLLs are in nats."""

    loss: torch.Tensor  # the divergence that the run trains with
    forward_kl: torch.Tensor
    reverse_kl: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    agreement: torch.Tensor  # 1 where both models rank the same token first
    top5_agreement: torch.Tensor  # the share of the teacher's five likeliest tokens that are among the student's five
    student_nll: torch.Tensor
    teacher_nll: torch.Tensor


@dataclass
class Objective:
    """A divergence with its settings.

    Attributes:
        vocab_size: the number of leading ids that both models share; logits are cut to them.
        temperature: of both distributions in `loss`.
    """

    divergence: Divergence
    vocab_size: int
    temperature: float = 1.0

    def loss(
        self, hidden: torch.Tensor, target: Target, labels: torch.Tensor, head: LogitHead, kd_ratio: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss of N scored positions.

        Args:
            hidden: the student's last hidden states (N, Hs).
            labels: the token that each position predicts, int64 (N,).
            head: the student's; its trainable parameters get their gradient too.
            kd_ratio: share of the divergence in the loss; the rest is cross-entropy.

        Returns:
            The summed loss, a scalar with gradient, and the `TokenStatistics` of each position, (6, N), without
            gradient; both in fp32. N = 0 gives zeros and a zero gradient, so that a rank without scored tokens takes
            part in the reduction. There is no second derivative: autograd raises a RuntimeError.
        """
        options = {"temperature": self.temperature, "kd_ratio": kd_ratio, "divergence": self.divergence}
        options["head_params"] = head.trainable_params()
        return distillation_loss(hidden, target, labels, head, None, self.vocab_size, **options)

    @torch.no_grad()
    def measure(self, hidden: torch.Tensor, target: Target, labels: torch.Tensor, head: LogitHead) -> torch.Tensor:
        """The `EvaluationStatistics` of N positions, fp32 (9, N), a chunk of logits at a time, without gradient.

        Arguments are those of `loss`. Raises ValueError if the target lacks the teacher's whole distribution.
        """
        tokens, device = len(labels), hidden.device
        wide = torch.promote_types(hidden.dtype, torch.float32)
        statistics = torch.zeros(len(EvaluationStatistics._fields), tokens, dtype=wide, device=device)
        if not tokens:
            return statistics
        # A quarter of a training chunk: here the divergence holds several copies of the logits.
        rows = min(max(chunk_tokens(self.vocab_size, device.type) // 4, 16), tokens)
        student = Projected(head, hidden, self.vocab_size, rows)
        teacher = target.logits(self.vocab_size, rows)
        if teacher is None:
            raise ValueError("An evaluation needs the teacher's whole distribution at each scored token.")
        for start in range(0, tokens, rows):
            part = slice(start, start + rows)
            logits = student.finish(student.project(hidden[part], gradient=False)).to(wide)  # (n, V)
            teacher_logits = teacher(part).to(wide)
            basic, _ = statistics_and_gradient(logits, teacher_logits, labels[part], self.divergence, gradient=False)
            both = (logits, teacher_logits)
            best, best_of_teacher = (values.topk(min(_TOP, self.vocab_size)).indices for values in both)  # (n, 5)
            top5_agreement = (best[:, :, None] == best_of_teacher[:, None]).any(1).to(wide).mean(1)
            nlls = [F.cross_entropy(values, labels[part], reduction="none") for values in both]
            statistics[:, part] = torch.stack([*basic, top5_agreement, *nlls])
        return statistics
