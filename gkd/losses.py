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
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

# A projection from hidden states (n, H) to logits (n, V); see gkd.heads.LogitHead.
Projection = Callable[[torch.Tensor], torch.Tensor]

# Logits exist for this many positions at a time: 1024 × 128256 in fp32 is 0.5 GiB a tensor.
CHUNK_TOKENS = 1024


class TokenStatistics(NamedTuple):
    """What one pass over the logits tells of each token; every field is fp32 of shape (N,).

    Only `loss` carries a gradient. `student_entropy` and the KLs are in nats; `agreement` is 1.0 where both models
    rank the same token first.
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


class _DistillationLoss(torch.autograd.Function):
    """Sum of the per-token loss over N positions, one chunk of logits alive at a time.

    The gradient to the student's hidden states, and to those parameters of its head that train, is computed chunk by
    chunk in the forward pass, while the chunk's logits exist; backward only scales it. So logits are projected once.
    """

    @staticmethod
    def forward(ctx, hidden, teacher_hidden, labels, project, project_teacher, vocab_size, loss_options, *head_params):
        # hidden (N, Hs), teacher_hidden (N, Ht), labels (N,)
        needs_grad = any(ctx.needs_input_grad)
        hidden_grad = torch.zeros_like(hidden) if needs_grad else None
        param_grads = [torch.zeros_like(p, dtype=torch.float32) for p in head_params] if needs_grad else []
        sums = torch.zeros(len(TokenStatistics._fields), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
                teacher_logits = project_teacher(teacher_hidden[rows])[..., :vocab_size]  # (n, V)
            with torch.set_grad_enabled(needs_grad):
                chunk = hidden[rows].detach().requires_grad_(needs_grad)  # (n, Hs)
                logits = project(chunk)[..., :vocab_size]  # (n, V)
                statistics = token_statistics(logits, teacher_logits, labels[rows], **loss_options)
            if needs_grad:
                ones = torch.ones_like(statistics.loss)
                grads = torch.autograd.grad(statistics.loss, [chunk, *head_params], grad_outputs=ones)
                hidden_grad[rows] = grads[0]
                for total, grad in zip(param_grads, grads[1:], strict=True):
                    total += grad
            sums += torch.stack([field.detach().sum().float() for field in statistics])
        ctx.save_for_backward(hidden_grad, *param_grads)
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _grad_sums):
        hidden_grad, *param_grads = ctx.saved_tensors
        # Autograd casts each gradient to the dtype of its input.
        return hidden_grad * grad_loss, *(None,) * 6, *(grad * grad_loss for grad in param_grads)


def distillation_loss(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    labels: torch.Tensor,
    project_student: Projection,
    project_teacher: Projection,
    vocab_size: int,
    beta: float,
    temperature: float = 1.0,
    kd_ratio: float = 1.0,
    head_params: tuple[torch.nn.Parameter, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of N scored positions, from the hidden states that come before each model's head.

    Args:
        student_hidden: (N, Hs), the last hidden states at scored positions. teacher_hidden: (N, Ht), the same.
        labels: the token that each position predicts, int64 (N,).
        project_student, project_teacher: hidden states -> logits.
        vocab_size: both models' logits are cut to this many ids, which they share.
        beta, temperature, kd_ratio: see `token_statistics`.
        head_params: the parameters of the student's head that train, which get their gradient here.

    Returns:
        The summed loss, an fp32 scalar with gradient, and the sums of `TokenStatistics`, fp32 (6,), without. N = 0
        gives zeros and a gradient of zeros, so that a rank with nothing to score still takes part in the reduction.
    """
    options = {"beta": beta, "temperature": temperature, "kd_ratio": kd_ratio}
    return _DistillationLoss.apply(
        student_hidden, teacher_hidden, labels, project_student, project_teacher, vocab_size, options, *head_params
    )
