"""The training loss from hidden states, with one chunk of logits at a time and the gradient in the same pass."""

import torch

from gkd.losses.divergences import Divergence, TokenStatistics, jsd
from gkd.losses.projection import Projected, Projection, chunk_tokens
from gkd.losses.targets import HiddenTarget, Target
from gkd.models.heads import LogitHead


class _DistillationLoss(torch.autograd.Function):
    """Sum of the per-token loss over N positions, with one chunk of logits in memory at a time.

    The forward pass also computes the gradients to the student's hidden states and to the trainable parameters of its
    head, while a chunk's logits exist; backward only scales them. So logits are projected once.
    """

    @staticmethod
    def forward(ctx, hidden, target, labels, head, vocab_size, divergence, temperature, kd_ratio, *params):
        gradient = any(ctx.needs_input_grad)
        tokens, device = hidden.shape[0], hidden.device
        rows = chunk_tokens(vocab_size, device.type)
        if divergence.kernel is None:  # torch and autograd hold several copies of the logits
            rows = max(rows // 4, 16)
        rows = min(rows, tokens)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        statistics = torch.zeros(len(TokenStatistics._fields), tokens, dtype=wide, device=device)  # (6, N)
        hidden_grad = torch.zeros_like(hidden) if gradient else None
        param_grads = [torch.zeros_like(p, dtype=wide) for p in params] if gradient else []
        if tokens:
            student = Projected(head, hidden, vocab_size, rows, params)
            compare = target.comparison(student, rows, divergence, temperature, kd_ratio)
        for start in range(0, tokens, rows or 1):
            part = slice(start, start + rows)
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

    All else, and the result: see `gkd.losses.objective.Objective`.
    """
    projections = project_student, project_teacher
    head, teacher_head = (p if isinstance(p, LogitHead | None) else LogitHead(p, 1.0, None) for p in projections)
    target = teacher_hidden if teacher_head is None else HiddenTarget(teacher_hidden, teacher_head)
    options = vocab_size, jsd(beta) if divergence is None else divergence, temperature, kd_ratio
    if not torch.is_grad_enabled():  # else autograd.Function computes the gradients of parameters
        head_params = ()
    return _DistillationLoss.apply(student_hidden, target, labels, head, *options, *head_params)
