"""The objective of training and evaluation: the divergence of student and teacher at scored positions.

Both hold one chunk of logits at a time; training computes the gradient in the same pass.
"""

import pkgutil
from collections import namedtuple
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from gkd.losses.crossed import AcrossVocabularies, CrossedTarget
from gkd.losses.divergences import Divergence, TokenStatistics, jsd, statistics_and_gradient
from gkd.losses.projection import Projected, Projection, chunk_tokens
from gkd.losses.targets import HiddenTarget, Target
from gkd.losses.uld import UldTarget
from gkd.metrics.divergences import DIVERGENCES
from gkd.models.heads import LogitHead

# The metrics of each scored token, fp32 (N,), always at temperature 1: those of training, the share of the teacher's five
# likeliest tokens that are among the student's five, and both models' negative log-likelihoods in nats.
EvaluationStatistics = namedtuple(
    "EvaluationStatistics", (*TokenStatistics._fields, "top5_agreement", "student_nll", "teacher_nll")
)


def divergence_of(args: Any) -> Divergence:
    """The divergence that the flags choose: --divergence, with --beta or --skew_alpha."""
    kind = DIVERGENCES[args.divergence]
    settings = [] if kind.flag is None else [getattr(args, kind.flag)]
    return pkgutil.resolve_name(kind.made_by)(*settings)


def _chunk_rows(vocab_size: int, device_type: str, target: Target, in_torch: bool) -> int:
    """The positions of a chunk: a quarter of those of a kernel where the divergence is `in_torch`, which holds several copies
    of the logits; it always is with a teacher that has another tokenizer, whose vocabulary may be the larger one."""
    if isinstance(target, AcrossVocabularies):
        in_torch, vocab_size = True, max(vocab_size, len(target.maps.teacher_classes))
    rows = chunk_tokens(vocab_size, device_type)
    return max(rows // 4, 16) if in_torch else rows


def _parts(target: Target, tokens: int, rows: int) -> Iterable[slice]:
    """The positions in parts of at most `rows`."""
    if isinstance(target, UldTarget):
        return target.parts(rows)
    return (slice(start, start + rows) for start in range(0, tokens, rows or 1))


class _DistillationLoss(torch.autograd.Function):
    """Sum of the per-token loss over N positions.

    The forward pass also computes the gradients to the student's hidden states and to the trainable parameters of its
    head, while a chunk's logits exist; backward only scales them. So logits are projected once.
    """

    @staticmethod
    def forward(ctx, hidden, target, labels, head, vocab_size, divergence, temperature, kd_ratio, *params):
        gradient = any(ctx.needs_input_grad)
        tokens, device = hidden.shape[0], hidden.device
        rows = min(_chunk_rows(vocab_size, device.type, target, in_torch=divergence.kernel is None), tokens)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        statistics = torch.zeros(len(TokenStatistics._fields), tokens, dtype=wide, device=device)  # (6, N)
        hidden_grad = torch.zeros_like(hidden) if gradient else None
        param_grads = [torch.zeros_like(p, dtype=wide) for p in params] if gradient else []
        if tokens:
            student = Projected(head, hidden, vocab_size, rows, params)
            compare = target.comparison(student, rows, divergence, temperature, kd_ratio)
        for part in _parts(target, tokens, rows):
            raw = student.project(hidden[part], gradient)  # (n, V)
            grad = compare(raw, part, labels[part], statistics[:, part], gradient)
            if gradient:
                student.backward(grad, hidden_grad[part], param_grads)
        ctx.save_for_backward(hidden_grad, *param_grads)
        ctx.mark_non_differentiable(statistics)
        return statistics[0].sum(), statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _grad_statistics):
        hidden_grad, *param_grads = ctx.saved_tensors
        # Autograd casts each gradient to the dtype of its input.
        return hidden_grad * grad_loss, *(None,) * 7, *(grad * grad_loss for grad in param_grads)


def distillation_loss(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor | Target,
    labels: torch.Tensor,
    project_student: LogitHead | Projection,
    project_teacher: LogitHead | Projection | None,
    vocab_size: int,
    beta: float = 0.5,
    temperature: float = 1.0,
    kd_ratio: float = 1.0,
    head_params: tuple[torch.nn.Parameter, ...] = (),
    divergence: Divergence | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of N scored positions, from the last hidden states of both models.

    Args:
        student_hidden: (N, Hs).
        teacher_hidden: (N, Ht), or another `gkd.losses.targets.Target`, such as a `gkd.losses.topk.TopK`.
        project_student, project_teacher: hidden states -> logits; None for the teacher if it is a Target.
        head_params: the trainable parameters of the student's head.
        divergence: by default the generalized JSD at `beta`.

    All else, and the result: see `Objective`.
    """
    projections = project_student, project_teacher
    head, teacher_head = (p if isinstance(p, LogitHead | None) else LogitHead(p, 1.0, None) for p in projections)
    target = teacher_hidden if teacher_head is None else HiddenTarget(teacher_hidden, teacher_head)
    params = head_params if torch.is_grad_enabled() else ()  # autograd.Function would compute their gradients
    options = vocab_size, divergence or jsd(beta), temperature, kd_ratio
    return _DistillationLoss.apply(student_hidden, target, labels, head, *options, *params)


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
        params = head.trainable_params()
        return distillation_loss(hidden, target, labels, head, None, self.vocab_size, **options, head_params=params)

    @torch.no_grad()
    def measure(self, hidden: torch.Tensor, target: Target, labels: torch.Tensor, head: LogitHead) -> torch.Tensor:
        """The `EvaluationStatistics` of N positions, fp32 (9, N), a chunk of logits at a time, without gradient.

        Arguments are those of `loss`. With a `TopK`, KLs and the teacher's entropy are of the coarse distributions, and
        the five likeliest tokens are at most its k. Raises ValueError if the target is neither the teacher's whole
        distribution nor a TopK that knows the token that follows. A teacher with another tokenizer has the negative log-likelihood
        of a whole span at its first token, and 0 at the others.
        """
        tokens, device = len(labels), hidden.device
        wide = torch.promote_types(hidden.dtype, torch.float32)
        statistics = torch.zeros(len(EvaluationStatistics._fields), tokens, dtype=wide, device=device)
        if not tokens:
            return statistics
        rows = min(_chunk_rows(self.vocab_size, device.type, target, in_torch=True), tokens)
        student = Projected(head, hidden, self.vocab_size, rows)
        crossed = target.measurement(rows, self.divergence) if isinstance(target, CrossedTarget) else None
        teacher = target.logits(self.vocab_size, rows)
        if teacher is None and crossed is None and getattr(target, "following", None) is None:
            raise ValueError("An evaluation needs the teacher's whole distribution at each scored token.")
        for start in range(0, tokens, rows):
            part = slice(start, start + rows)
            logits = student.finish(student.project(hidden[part], gradient=False)).to(wide)  # (n, V)
            student_nll = F.cross_entropy(logits, labels[part], reduction="none")
            if crossed is not None:
                basic, top5_agreement, teacher_nll = crossed(logits, part, labels[part])
                statistics[:, part] = torch.stack([*basic, top5_agreement, student_nll, teacher_nll.to(wide)])
                continue
            if teacher is None:
                known = target[part]
                basic, _ = known.statistics_and_gradient(logits, labels[part], self.divergence, gradient=False)
                best_of_teacher, teacher_nll = known.ids[:, :5], -known.following
            else:
                teacher_logits = teacher(part).to(wide)
                basic, _ = statistics_and_gradient(
                    logits, teacher_logits, labels[part], self.divergence, gradient=False
                )
                best_of_teacher = teacher_logits.topk(min(5, self.vocab_size)).indices  # (n, 5)
                teacher_nll = F.cross_entropy(teacher_logits, labels[part], reduction="none")
            best = logits.topk(best_of_teacher.shape[1]).indices
            top5_agreement = (best[:, :, None] == best_of_teacher[:, None]).any(1).to(wide).mean(1)
            statistics[:, part] = torch.stack([*basic, top5_agreement, student_nll, teacher_nll])
        return statistics
