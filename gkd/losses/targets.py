"""What the student is compared with at scored positions: `Target`, and `HiddenTarget` for a teacher's hidden states."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from gkd.losses import kernel
from gkd.losses.divergences import Divergence, statistics_and_gradient
from gkd.losses.projection import Projected
from gkd.models.heads import LogitHead

# (raw, part, labels, statistics, gradient) -> d loss / d raw (n, V), or None without `gradient`. Compares at the n positions
# `part` of all N: reads `raw` (n, V), the output of the student's `Projected.project`, and `labels` (n,), and fills in
# `statistics`, the `TokenStatistics` (6, n).
Compare = Callable[[torch.Tensor, slice, torch.Tensor, torch.Tensor, bool], torch.Tensor | None]


class Target(Protocol):
    """The teacher's output at N scored positions, and how the student's logits are compared with it."""

    def comparison(
        self, student: Projected, rows: int, divergence: Divergence, temperature: float, kd_ratio: float
    ) -> Compare:
        """A function that compares at most `rows` positions at a time; see `gkd.losses.divergences.statistics_and_gradient`."""

    def logits(self, vocab_size: int, rows: int) -> Callable[[slice], torch.Tensor] | None:
        """A function from at most `rows` positions to the teacher's logits (n, V); None if they are not known."""


@dataclass
class HiddenTarget:
    """The teacher's last hidden states (N, Ht) and its head: together its whole distribution."""

    hidden: torch.Tensor
    head: LogitHead

    def _projected(self, vocab_size: int, rows: int) -> Projected:
        with torch.autocast(self.hidden.device.type, enabled=False):  # the teacher computes in its own dtype
            return Projected(self.head, self.hidden, vocab_size, rows)

    def comparison(
        self, student: Projected, rows: int, divergence: Divergence, temperature: float, kd_ratio: float
    ) -> Compare:
        """Compares by the Triton kernel if it runs here and supports the divergence, else in torch."""
        teacher = self._projected(student.vocab_size, rows)
        grads = None

        def compare(raw, part, labels, statistics, gradient):
            nonlocal grads
            teacher_raw = teacher.project(self.hidden[part], gradient=False)  # (n, V)
            if divergence.kernel is not None and kernel.supports(self.hidden.device, student.vocab_size):
                if gradient and grads is None:
                    half = student.dtype if student.weight is not None else raw.dtype
                    grads = torch.empty(rows, student.vocab_size, dtype=half, device=raw.device)
                grad = grads[: len(raw)] if gradient else None
                try:
                    kernel.launch(
                        raw, teacher_raw, labels, grad, statistics, **divergence.kernel,
                        temperature=temperature, kd_ratio=kd_ratio,
                        student_bias=student.bias, teacher_bias=teacher.bias,
                        student_scale=student.head.scale, teacher_scale=self.head.scale,
                        student_softcap=student.head.softcap, teacher_softcap=self.head.softcap,
                    )  # fmt: skip
                    return grad
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # whatever Triton raises if it can't build
                    kernel.give_up(error)
            logits, options = student.finish(raw), (divergence, temperature, kd_ratio, gradient)
            values, grad = statistics_and_gradient(logits, teacher.finish(teacher_raw), labels, *options)
            statistics[:] = torch.stack(values)
            return student.head.to_raw(grad, logits) if gradient else None

        return compare

    def logits(self, vocab_size: int, rows: int) -> Callable[[slice], torch.Tensor]:
        teacher = self._projected(vocab_size, rows)
        return lambda part: teacher.finish(teacher.project(self.hidden[part], gradient=False))
