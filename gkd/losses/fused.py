"""The loss of training: from hidden states, a chunk of logits at a time, with the gradient in the same pass."""

from functools import partial

import torch

from gkd.losses import kernel
from gkd.losses.divergences import TokenStatistics, statistics_and_gradient
from gkd.losses.projection import Projected, Projection, chunk_tokens
from gkd.losses.topk import TopK
from gkd.models.heads import LogitHead


class _DistillationLoss(torch.autograd.Function):
    """Sum of the per-token loss over N positions, one chunk of logits alive at a time.

    The gradient to the student's hidden states, and to those parameters of its head that train, is computed chunk by
    chunk in the forward pass, while the chunk's logits exist; backward only scales it. So logits are projected once.
    """

    @staticmethod
    def forward(ctx, hidden, teacher_hidden, labels, head, teacher_head, vocab_size, options, *params):
        # hidden (N, Hs), teacher_hidden (N, Ht) or a TopK of N, labels (N,)
        gradient = any(ctx.needs_input_grad)
        tokens, device = hidden.shape[0], hidden.device
        rows = min(chunk_tokens(vocab_size, device.type), tokens)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        statistics = torch.zeros(len(TokenStatistics._fields), tokens, dtype=wide, device=device)  # (6, N)
        hidden_grad = torch.zeros_like(hidden) if gradient else None
        param_grads = [torch.zeros_like(p, dtype=wide) for p in params] if gradient else []
        if tokens:
            student = Projected(head, hidden, vocab_size, rows, params)
            live = teacher_head is not None
            if live:
                with torch.autocast(device.type, enabled=False):  # the teacher computes in its own dtype
                    teacher = Projected(teacher_head, teacher_hidden, vocab_size, rows)
            fused = live and kernel.supports(device, vocab_size)
            grads = None
        for start in range(0, tokens, rows or 1):
            part = slice(start, start + rows)
            raw = student.project(hidden[part], gradient)  # (n, V)
            if live:
                teacher_raw = teacher.project(teacher_hidden[part], gradient=False)  # (n, V)
            grad = None
            if fused and gradient:
                if grads is None:
                    half = student.dtype if student.weight is not None else raw.dtype
                    grads = torch.empty(rows, vocab_size, dtype=half, device=device)
                grad = grads[: len(raw)]
            if fused:
                try:
                    kernel.launch(
                        raw, teacher_raw, labels[part], grad, statistics[:, part], **options,
                        student_bias=student.bias, teacher_bias=teacher.bias,
                        student_scale=head.scale, teacher_scale=teacher_head.scale,
                        student_softcap=head.softcap, teacher_softcap=teacher_head.softcap,
                    )  # fmt: skip
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # whatever Triton raises where it can't build
                    kernel.give_up(error)
                    fused = False
            if not fused:
                logits = student.finish(raw)
                if live:
                    compare = partial(statistics_and_gradient, teacher_logits=teacher.finish(teacher_raw))
                else:
                    compare = teacher_hidden[part].statistics_and_gradient
                found, grad = compare(logits, labels=labels[part], **options, gradient=gradient)
                statistics[:, part] = torch.stack(found)
                if gradient:
                    grad = head.to_raw(grad, logits)
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
        return hidden_grad * grad_loss, *(None,) * 6, *(grad * grad_loss for grad in param_grads)


def distillation_loss(
    student_hidden: torch.Tensor,
    teacher_hidden: "torch.Tensor | TopK",
    labels: torch.Tensor,
    project_student: LogitHead | Projection,
    project_teacher: LogitHead | Projection | None,
    vocab_size: int,
    beta: float,
    temperature: float = 1.0,
    kd_ratio: float = 1.0,
    head_params: tuple[torch.nn.Parameter, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of N scored positions, from the hidden states that come before each model's head.

    Args:
        student_hidden: (N, Hs), the last hidden states at scored positions. teacher_hidden: (N, Ht), the same,
            or what is known of the teacher's distribution there, a `gkd.losses.topk.TopK`.
        labels: the token that each position predicts, int64 (N,).
        project_student, project_teacher: hidden states -> logits; the teacher's is None beside a TopK.
        vocab_size: both models' logits are cut to this many ids, which they share.
        beta, temperature, kd_ratio: see `token_statistics`.
        head_params: the parameters of the student's head that train, which get their gradient here.

    Returns:
        The summed loss, a scalar with gradient, and the `TokenStatistics` of each position, (6, N), without; both in
        fp32. N = 0 gives zeros and a gradient of zeros, so that a rank with nothing to score still takes part in the
        reduction. The gradient can't be differentiated again: autograd raises a RuntimeError.
    """
    options = {"beta": beta, "temperature": temperature, "kd_ratio": kd_ratio}
    if not torch.is_grad_enabled():  # autograd.Function would compute the parameters' gradients all the same
        head_params = ()
    heads = [
        p if isinstance(p, LogitHead | None) else LogitHead(p, 1.0, None) for p in (project_student, project_teacher)
    ]
    return _DistillationLoss.apply(student_hidden, teacher_hidden, labels, *heads, vocab_size, options, *head_params)
