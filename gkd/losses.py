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
    statistics_and_gradient  the same numbers and their gradient in closed form (in Triton: gkd.divergence_kernel)
    distillation_loss        from hidden states, a chunk of logits at a time; the teacher's may be a gkd.topk.TopK
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from gkd import divergence_kernel
from gkd.heads import LogitHead, widened

if TYPE_CHECKING:
    from gkd.topk import TopK

# A projection from hidden states (n, H) to logits (n, V).
Projection = Callable[[torch.Tensor], torch.Tensor]

BYTES_PER_LOGIT = 4 + 4 + 2  # both models' in fp32 and the gradient in bf16
# What a chunk of logits may take. On a CPU about as much as its caches hold.
CHUNK_BYTES = {"cuda": 960 * 2**20, "cpu": 64 * 2**20}


def chunk_tokens(vocab_size: int, device_type: str) -> int:
    """How many positions have logits at a time; so memory does not grow with the vocabulary."""
    rows = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (vocab_size * BYTES_PER_LOGIT)
    # Matrix products are cut into tiles of 128 or 256 rows.
    return max(rows // 256 * 256, 128) if rows >= 128 else max(rows, 16)


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


def _mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """``out = a @ b``; half-precision products are summed and kept in fp32 if `out` is fp32 (CUDA, torch 2.8)."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b``, without rounding the product to a lower precision than `total` first."""
    if total.dtype != a.dtype and a.device.type == "cuda" and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class Projected:
    """A head during one call of the loss: projects chunks of hidden states, and takes gradients back to them.

    A plain linear head is multiplied by its weight here, in fp32 on CUDA and into one buffer for all chunks; any other
    module (LoRA, quantized) is called, and asked for its gradients by autograd.
    """

    def __init__(self, head: LogitHead, hidden: torch.Tensor, vocab_size: int, rows: int, params=()):
        self.head, self.vocab_size, self.params = head, vocab_size, params
        device = hidden.device.type
        self.autocast = torch.is_autocast_enabled(device)
        self.context = torch.autocast(device, torch.get_autocast_dtype(device), enabled=self.autocast)
        self.weight = self.bias = None
        linear = head.linear
        if linear is not None and all(any(p is q for q in linear) for p in params):
            weight, bias = (None if p is None else p.detach() for p in linear)
            self.dtype = torch.get_autocast_dtype(device) if self.autocast else weight.dtype
            self.weight = weight[:vocab_size].to(self.dtype)  # (V, H)
            self.bias = None if bias is None else bias[:vocab_size]
            wide = device == "cuda" and hasattr(torch.ops.aten.mm, "dtype_out")
            out = torch.float32 if wide and self.dtype in (torch.bfloat16, torch.float16) else self.dtype
            self.logits = torch.empty(rows, vocab_size, dtype=out, device=hidden.device)

    def project(self, hidden: torch.Tensor, gradient: bool) -> torch.Tensor:
        """(n, H) -> (n, V), the head's output before scale and softcap; the bias of a linear head is left to `finish`."""
        if self.weight is not None:
            self.states = hidden.to(self.dtype)
            raw = self.logits[: len(hidden)]
            with torch.autocast(hidden.device.type, enabled=False):
                _mm(self.states, self.weight.T, raw)
            return raw
        with torch.set_grad_enabled(gradient), self.context:
            self.states = hidden.detach().requires_grad_(gradient)
            self.raw = self.head.raw(self.states)[..., : self.vocab_size]
        return self.raw.detach()

    def finish(self, raw: torch.Tensor) -> torch.Tensor:
        """The logits: bias, scale and softcap applied, in fp32."""
        return self.head.finish(raw if self.bias is None else widened(raw) + self.bias)

    def backward(self, grad: torch.Tensor, hidden_grad: torch.Tensor, param_grads: list[torch.Tensor]) -> None:
        """From d loss / d raw (n, V): writes the gradient to the states, adds the parameters' to `param_grads`."""
        if self.weight is None:
            grads = torch.autograd.grad(self.raw, [self.states, *self.params], grad.to(self.raw.dtype))
            hidden_grad.copy_(grads[0])
            for total, part in zip(param_grads, grads[1:], strict=True):
                total += part
            return
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.to(self.dtype)
            if hidden_grad.dtype == self.dtype:
                torch.mm(grad, self.weight, out=hidden_grad)
            else:
                hidden_grad.copy_(grad @ self.weight)
            weight, _ = self.head.linear
            for parameter, total in zip(self.params, param_grads, strict=True):
                if parameter is weight:
                    _add_product(total[: self.vocab_size], grad.T, self.states)
                else:
                    total[: self.vocab_size] += grad.sum(0, dtype=total.dtype)


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
            fused = live and divergence_kernel.supports(device, vocab_size)
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
                    divergence_kernel.launch(
                        raw, teacher_raw, labels[part], grad, statistics[:, part], **options,
                        student_bias=student.bias, teacher_bias=teacher.bias,
                        student_scale=head.scale, teacher_scale=teacher_head.scale,
                        student_softcap=head.softcap, teacher_softcap=teacher_head.softcap,
                    )  # fmt: skip
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # whatever Triton raises where it can't build
                    divergence_kernel.give_up(error)
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
            or what is known of the teacher's distribution there, a `gkd.topk.TopK`.
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
