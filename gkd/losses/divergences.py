"""Divergences of the student from the teacher, in nats per token, from both models' logits.

`--beta` means the same as in TRL: ``beta = 0`` is the forward KL(teacher || student), ``beta = 1`` the reverse
KL(student || teacher), and between them the generalized Jensen-Shannon divergence of Eq. (1) of arXiv 2306.13649,
``beta KL(teacher || m) + (1 - beta) KL(student || m)`` with ``m = beta teacher + (1 - beta) student``.

Deviations from the paper, numbered:

1. At ``beta = 0`` and ``beta = 1`` the paper's JSD vanishes; like TRL we return its limits after division by ``beta``
   or ``1 - beta``, the forward and the reverse KL.
2. ``kd_ratio`` mixes in cross-entropy on text of the dataset or the teacher, as torchtune's loss does.
3. ``loss_temperature`` divides both models' logits inside the divergence. No ``T²`` factor is applied (Hinton et al.
   apply one; TRL's DistillationTrainer does not).

`statistics_and_gradient` computes the loss of training and its gradient without a graph (in Triton: gkd.losses.kernel).
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from gkd.models.heads import widened


class TokenStatistics(NamedTuple):
    """The loss and metrics of each token, fp32 (N,), without gradients; entropies and KLs in nats."""

    loss: torch.Tensor
    forward_kl: torch.Tensor
    reverse_kl: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    agreement: torch.Tensor  # 1 where both models rank the same token first


class Pair(NamedTuple):
    """Both models' distributions over a chunk of tokens, (N, V), and their KLs, (N,), without gradients."""

    log_student: torch.Tensor
    log_teacher: torch.Tensor
    student: torch.Tensor  # probabilities
    teacher: torch.Tensor
    gap: torch.Tensor  # log_teacher - log_student
    forward_kl: torch.Tensor
    reverse_kl: torch.Tensor


class Divergence:
    """Base class of the divergences of the student's distribution from the teacher's, per token.

    A subclass defines `value`, and may override `value_and_gradient` if the gradient has a closed form.

    Attributes:
        name: its name in `--divergence`.
        settings: the flags that it depends on, by name.
        kernel: the arguments by which `gkd.losses.kernel.launch` computes it; None if the kernel can't.
    """

    name: str
    settings: dict[str, float] = {}
    kernel: dict[str, Any] | None = None

    def value(self, log_student: torch.Tensor, log_teacher: torch.Tensor) -> torch.Tensor:
        """The divergence of each token, (N,), from log-probabilities (N, V) in float32 or float64."""
        raise NotImplementedError

    def value_and_gradient(self, pair: Pair, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The value (N,), and if `gradient` its gradient to the student's logits (N, V), else None.

        Called without a graph. It may overwrite the (N, V) tensors of `pair`.
        """
        if not gradient:
            return self.value(pair.log_student, pair.log_teacher), None
        with torch.enable_grad():
            log_student = pair.log_student.detach().requires_grad_()
            value = self.value(log_student, pair.log_teacher)
            (slope,) = torch.autograd.grad(value.sum(), log_student)
        scaled = pair.student.mul_(slope.sum(-1, keepdim=True))
        return value.detach(), torch.sub(slope, scaled, out=scaled)  # the chain rule through log_softmax

    def __repr__(self) -> str:
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.settings.items())])


def log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities at a temperature."""
    return F.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)  # 1.0: saves a copy


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) per token. (N, V), (N, V) -> (N,)"""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class GeneralizedJSD(Divergence):
    """Generalized Jensen-Shannon divergence, arXiv 2306.13649 Eq. (1), for β strictly between 0 and 1; see `jsd`.

    With ``s``, ``t`` the student's and the teacher's probabilities and ``m`` their mixture, its gradient to the student's
    logits is ``(1 - beta) s (log s - log m - KL(s || m))``.
    """

    name = "jsd"

    def __init__(self, beta: float):
        self.beta = beta
        self.settings = self.kernel = {"beta": beta}

    def _log_mixture(self, log_student: torch.Tensor, log_teacher: torch.Tensor) -> torch.Tensor:
        return torch.logaddexp(log_student + math.log1p(-self.beta), log_teacher + math.log(self.beta))

    def value(self, log_student: torch.Tensor, log_teacher: torch.Tensor) -> torch.Tensor:
        mixture = self._log_mixture(log_student, log_teacher)
        return self.beta * kl(log_teacher, mixture) + (1 - self.beta) * kl(log_student, mixture)

    def value_and_gradient(self, pair: Pair, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        mixture = self._log_mixture(pair.log_student, pair.log_teacher)
        student_over = pair.log_student.sub_(mixture)  # log s - log m
        student_kl = (pair.student * student_over).sum(-1)
        teacher_kl = (pair.teacher.mul_(pair.log_teacher.sub_(mixture))).sum(-1)
        value = self.beta * teacher_kl + (1 - self.beta) * student_kl
        if not gradient:
            return value, None
        return value, student_over.sub_(student_kl[:, None]).mul_(pair.student).mul_(1 - self.beta)


class ForwardKL(GeneralizedJSD):
    """KL(teacher || student), TRL's value at β = 0. Its gradient is ``s - t``."""

    def value(self, log_student: torch.Tensor, log_teacher: torch.Tensor) -> torch.Tensor:
        return kl(log_teacher, log_student)

    def value_and_gradient(self, pair: Pair, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        return pair.forward_kl, pair.student - pair.teacher if gradient else None


class ReverseKL(GeneralizedJSD):
    """KL(student || teacher), TRL's value at β = 1. Its gradient is ``s (log s - log t - KL(s || t))``."""

    def value(self, log_student: torch.Tensor, log_teacher: torch.Tensor) -> torch.Tensor:
        return kl(log_student, log_teacher)

    def value_and_gradient(self, pair: Pair, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        grad = pair.student * (pair.gap + pair.reverse_kl[:, None]).neg_() if gradient else None
        return pair.reverse_kl, grad


def jsd(beta: float) -> GeneralizedJSD:
    """The generalized JSD at β, with the forward KL at 0 and the reverse KL at 1 as in TRL."""
    kind = ForwardKL if beta == 0.0 else ReverseKL if beta == 1.0 else GeneralizedJSD
    return kind(beta)


@torch.no_grad()
def statistics_and_gradient(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    divergence: Divergence,
    temperature: float = 1.0,
    kd_ratio: float = 1.0,
    gradient: bool = True,
) -> tuple[TokenStatistics, torch.Tensor | None]:
    """Per-token loss ``(1 - kd_ratio) · cross-entropy + kd_ratio · divergence``, its metrics, and its gradient.

    Args:
        student_logits, teacher_logits: (N, V) in any float dtype; arithmetic is in float32 (float64 stays float64).
        labels: the next token of each position, int64 (N,); read only when ``kd_ratio < 1``.
        temperature: of the divergence. The cross-entropy is always taken at temperature 1.
        kd_ratio: share of the divergence in the loss.

    Returns:
        The statistics, (N,) each, and the gradient of each row's loss to its student logits (N, V), or None.
    """
    raw = widened(student_logits)
    student, teacher = log_softmax(raw, temperature), log_softmax(teacher_logits.to(raw.dtype), temperature)  # (N, V)
    agreement = (student.argmax(-1) == teacher.argmax(-1)).to(raw.dtype)
    s, t = student.exp(), teacher.exp()
    student_entropy, teacher_entropy = -(s * student).sum(-1), -(t * teacher).sum(-1)
    gap = teacher - student
    forward_kl, reverse_kl = (t * gap).sum(-1), -(s * gap).sum(-1)
    pair = Pair(student, teacher, s, t, gap, forward_kl, reverse_kl)
    loss, grad = divergence.value_and_gradient(pair, gradient)
    loss = mix_cross_entropy(loss, grad, raw, labels, temperature, kd_ratio)
    return TokenStatistics(loss, forward_kl, reverse_kl, student_entropy, teacher_entropy, agreement), grad


def mix_cross_entropy(divergence, grad, logits, labels, temperature: float, kd_ratio: float) -> torch.Tensor:
    """``(1 - kd_ratio) · cross-entropy + kd_ratio · divergence``, (N,), for the student's `logits` (N, V).

    `grad` (N, V), the divergence's gradient to ``logits / temperature`` or None, becomes that of the result to `logits`.
    """
    if grad is not None and temperature != 1.0:
        grad /= temperature
    if kd_ratio >= 1.0:
        return divergence
    log_probs = F.log_softmax(logits, dim=-1)
    picked = labels[:, None]
    loss = kd_ratio * divergence - (1 - kd_ratio) * log_probs.gather(1, picked)[:, 0]
    if grad is not None:
        grad.mul_(kd_ratio).add_(log_probs.exp_(), alpha=1 - kd_ratio)
        grad.scatter_add_(1, picked, torch.full_like(picked, kd_ratio - 1, dtype=grad.dtype))
    return loss
