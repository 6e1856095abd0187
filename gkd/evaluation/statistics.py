"""What evaluation measures of each token: both models' logits in, one row of numbers out. No gradient, no kernel."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gkd.losses.divergences import statistics_and_gradient
from gkd.losses.projection import Projected, chunk_tokens
from gkd.models.heads import LogitHead

_TOP = 5


class EvaluationStatistics(NamedTuple):
    """Of each scored token, fp32 (N,); divergences, entropies and negative log-likelihoods in nats.

    Always of the models' own distributions: temperature 1, whatever the run trains with.
    """

    loss: torch.Tensor  # the generalized JSD at β
    forward_kl: torch.Tensor
    reverse_kl: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    agreement: torch.Tensor  # 1 where both models rank the same token first
    top5_agreement: torch.Tensor  # the share of the teacher's five likeliest tokens that are among the student's five
    student_nll: torch.Tensor
    teacher_nll: torch.Tensor


@torch.no_grad()
def evaluation_statistics(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    labels: torch.Tensor,
    student_head: LogitHead,
    teacher_head: LogitHead,
    vocab_size: int,
    beta: float,
) -> torch.Tensor:
    """The `EvaluationStatistics` of N positions, fp32 (9, N), a chunk of logits at a time.

    Args:
        student_hidden: (N, Hs), the last hidden states at scored positions. teacher_hidden: (N, Ht), the same.
        labels: the token that each position predicts, int64 (N,).
        vocab_size: both models' logits are cut to this many ids, which they share.
        beta: of the generalized JSD, see `gkd.losses.divergences`.
    """
    tokens, device = len(labels), student_hidden.device
    wide = torch.promote_types(student_hidden.dtype, torch.float32)
    found = torch.zeros(len(EvaluationStatistics._fields), tokens, dtype=wide, device=device)
    if not tokens:
        return found
    # A quarter of a training chunk: here the divergence holds several copies of the logits.
    rows = min(max(chunk_tokens(vocab_size, device.type) // 4, 16), tokens)
    student = Projected(student_head, student_hidden, vocab_size, rows)
    with torch.autocast(device.type, enabled=False):  # the teacher computes in its own dtype
        teacher = Projected(teacher_head, teacher_hidden, vocab_size, rows)
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        logits, teacher_logits = (
            model.finish(model.project(hidden[part], gradient=False)).to(wide)  # (n, V)
            for model, hidden in ((student, student_hidden), (teacher, teacher_hidden))
        )
        basic, _ = statistics_and_gradient(logits, teacher_logits, labels[part], beta, gradient=False)
        best, wanted = (values.topk(min(_TOP, vocab_size)).indices for values in (logits, teacher_logits))  # (n, 5)
        shared = (best[:, :, None] == wanted[:, None]).any(1).to(wide).mean(1)
        losses = [F.cross_entropy(values, labels[part], reduction="none") for values in (logits, teacher_logits)]
        found[:, part] = torch.stack([*basic, shared, *losses])
    return found


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same completion (Welleck et al. 2020, seq-rep-n); 0 if too short."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
