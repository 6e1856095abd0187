"""The divergence: logits or hidden states in, per-token divergence out.

Conventions, all from TRL so that a `--beta` means the same in both:

* ``beta = 0`` is the forward KL(teacher || student), ``beta = 1`` the reverse KL(student || teacher), and between them
  the generalized Jensen-Shannon divergence of Eq. (1) of arXiv 2306.13649,
  ``beta KL(teacher || m) + (1 - beta) KL(student || m)`` with ``m = beta teacher + (1 - beta) student``.
* Units are nats per token.

Deviations from the paper, numbered:

1. At ``beta = 0`` and ``beta = 1`` the paper's JSD vanishes; like TRL we return its limits after division by ``beta``
   or ``1 - beta``, the forward and the reverse KL.
2. ``kd_ratio`` mixes in cross-entropy on text that somebody else wrote (dataset or teacher), torchtune's loss.
3. ``loss_temperature`` divides both models' logits inside the divergence. No ``T²`` factor is applied (Hinton et al.
   apply one; TRL's DistillationTrainer does not).

Three functions, from the definition to what training calls:

    token_statistics         whole logits, differentiable by autograd: the definition
    statistics_and_gradient  the same numbers and their gradient in closed form (in Triton: gkd.losses.kernel)
    distillation_loss        from hidden states, a chunk of logits at a time; the teacher's may be a gkd.losses.topk.TopK
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    pass


class TokenStatistics(NamedTuple):
    """What one pass over the logits tells of each token; every field is fp32 of shape (N,).

    Only `loss` carries a gradient. Entropies and the KLs are in nats; `agreement` is 1.0 where both models rank the
    same token first.
    """

    loss: torch.Tensor
    forward_kl: torch.Tensor
    reverse_kl: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    agreement: torch.Tensor


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) per token. (N, V), (N, V) -> (N,)"""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def generalized_jsd(student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, beta: float) -> torch.Tensor:
    """Generalized Jensen-Shannon divergence per token, arXiv 2306.13649 Eq. (1) with TRL's ends.

    Args:
        student_log_probs, teacher_log_probs: log-probabilities (N, V), float32 or float64.
        beta: 0 is the forward KL, 1 the reverse KL.

    Returns:
        The divergence in nats, (N,), in the dtype of the inputs.
    """
    if beta == 0.0:
        return _kl(teacher_log_probs, student_log_probs)
    if beta == 1.0:
        return _kl(student_log_probs, teacher_log_probs)
    mixture = torch.logaddexp(student_log_probs + math.log1p(-beta), teacher_log_probs + math.log(beta))
    return beta * _kl(teacher_log_probs, mixture) + (1 - beta) * _kl(student_log_probs, mixture)


def token_statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    beta: float,
    temperature: float = 1.0,
    kd_ratio: float = 1.0,
) -> TokenStatistics:
    """Per-token loss ``(1 - kd_ratio) · cross-entropy + kd_ratio · divergence``, with the metrics it yields for free.

    Args:
        student_logits, teacher_logits: (N, V) in any float dtype; arithmetic is in float32 (float64 stays float64).
        labels: the next token of each position, int64 (N,); read only when ``kd_ratio < 1``.
        beta, temperature: of the divergence. The cross-entropy is always taken at temperature 1.
        kd_ratio: share of the divergence in the loss.
    """
    work = torch.promote_types(student_logits.dtype, torch.float32)
    student_logits, teacher_logits = student_logits.to(work), teacher_logits.to(work)
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    divergence = generalized_jsd(student, teacher, beta)
    loss = divergence
    if kd_ratio < 1.0:
        loss = (1 - kd_ratio) * F.cross_entropy(student_logits, labels, reduction="none") + kd_ratio * divergence
    with torch.no_grad():
        return TokenStatistics(
            loss=loss,
            forward_kl=divergence.detach() if beta == 0.0 else _kl(teacher, student),
            reverse_kl=divergence.detach() if beta == 1.0 else _kl(student, teacher),
            student_entropy=-(student.exp() * student).sum(-1),
            teacher_entropy=-(teacher.exp() * teacher).sum(-1),
            agreement=(student.argmax(-1) == teacher.argmax(-1)).to(work),
        )


@torch.no_grad()
def statistics_and_gradient(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    beta: float,
    temperature: float = 1.0,
    kd_ratio: float = 1.0,
    gradient: bool = True,
) -> tuple[TokenStatistics, torch.Tensor | None]:
    """`token_statistics`, and the gradient of each row's loss to that row's student logits, in closed form.

    With ``s``, ``t`` the student's and the teacher's probabilities and ``m`` their mixture, the gradient of the
    divergence to the student's logits is

        beta = 0:  s - t
        beta = 1:  s (log s - log t - KL(s || t))
        between:   (1 - beta) s (log s - log m - KL(s || m))

    Returns:
        The statistics, (N,) each, and the gradient (N, V) in float32 (float64 for float64 logits), or None.
    """
    work = torch.promote_types(student_logits.dtype, torch.float32)
    raw = student_logits.to(work)
    student = F.log_softmax(raw if temperature == 1.0 else raw / temperature, dim=-1)  # (N, V) log s
    teacher = teacher_logits.to(work)
    teacher = F.log_softmax(teacher if temperature == 1.0 else teacher / temperature, dim=-1)  # (N, V) log t
    agreement = (student.argmax(-1) == teacher.argmax(-1)).to(work)
    s, t = student.exp(), teacher.exp()
    student_entropy, teacher_entropy = -(s * student).sum(-1), -(t * teacher).sum(-1)
    gap = teacher - student
    forward_kl, reverse_kl = (t * gap).sum(-1), -(s * gap).sum(-1)
    if beta == 0.0:
        loss, grad = forward_kl, s - t if gradient else None
    elif beta == 1.0:
        loss, grad = reverse_kl, s * (gap + reverse_kl[:, None]).neg_() if gradient else None
    else:
        mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))  # (N, V) log m
        student_over = student.sub_(mixture)  # log s - log m
        student_kl = (s * student_over).sum(-1)
        loss = beta * (t.mul_(teacher.sub_(mixture))).sum(-1) + (1 - beta) * student_kl
        grad = student_over.sub_(student_kl[:, None]).mul_(s).mul_(1 - beta) if gradient else None
    if gradient and temperature != 1.0:
        grad /= temperature
    if kd_ratio < 1.0:
        loss = mix_cross_entropy(loss, grad, raw, labels, kd_ratio)
    return TokenStatistics(loss, forward_kl, reverse_kl, student_entropy, teacher_entropy, agreement), grad


def mix_cross_entropy(
    divergence: torch.Tensor, grad: torch.Tensor | None, logits: torch.Tensor, labels: torch.Tensor, kd_ratio: float
) -> torch.Tensor:
    """``(1 - kd_ratio) · cross-entropy + kd_ratio · divergence``, (N,); `grad` (N, V) is changed in place to match.

    The logits (N, V) are the student's, undivided: the cross-entropy is at temperature 1.
    """
    log_probs = F.log_softmax(logits, dim=-1)
    picked = labels[:, None]
    loss = kd_ratio * divergence - (1 - kd_ratio) * log_probs.gather(1, picked)[:, 0]
    if grad is not None:
        grad.mul_(kd_ratio).add_(log_probs.exp_(), alpha=1 - kd_ratio)
        grad.scatter_add_(1, picked, torch.full_like(picked, kd_ratio - 1, dtype=grad.dtype))
    return loss
