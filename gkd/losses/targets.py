"""What the student is compared with at scored positions: `Target`, and targets of hidden states, by one teacher or several."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from gkd.losses import kernel
from gkd.losses.divergences import Divergence, TokenStatistics, log_softmax, statistics_and_gradient
from gkd.losses.projection import Projected
from gkd.models.heads import LogitHead, widened

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
        settings = divergence, temperature, kd_ratio

        def read(part: slice) -> torch.Tensor:
            return teacher.project(self.hidden[part], gradient=False)  # (n, V)

        return _comparison(
            student, rows, settings, read, teacher.finish, teacher.bias, self.head.scale, self.head.softcap
        )

    def logits(self, vocab_size: int, rows: int) -> Callable[[slice], torch.Tensor]:
        teacher = self._projected(vocab_size, rows)
        return lambda part: teacher.finish(teacher.project(self.hidden[part], gradient=False))


@dataclass
class SeveralTarget:
    """Several teachers, each at some of N positions.

    Attributes:
        parts: of each teacher its positions, int64 (n,) in rising order; its share there, fp32 (n,); and its target there.
            At each position the shares sum to 1: what the student is compared with is the mixture of distributions.
        count: N.
    """

    parts: list[tuple[torch.Tensor, torch.Tensor, Target]]
    count: int

    def comparison(
        self, student: Projected, rows: int, divergence: Divergence, temperature: float, kd_ratio: float
    ) -> Compare:
        read = self.logits(student.vocab_size, rows)
        return _comparison(student, rows, (divergence, temperature, kd_ratio), read, lambda raw: raw)

    def logits(self, vocab_size: int, rows: int) -> Callable[[slice], torch.Tensor]:
        """Raises ValueError if a teacher's whole distribution is not known."""
        readers = [target.logits(vocab_size, rows) for *_, target in self.parts]
        if None in readers:
            raise ValueError("Several teachers need the whole distribution of each.")

        def read(part: slice) -> torch.Tensor:
            """Log-probabilities (n, V) of the mixture, which are logits."""
            start, end = part.start, min(part.stop, self.count)
            mixed = None
            for (positions, shares, _), logits in zip(self.parts, readers, strict=True):
                first, last = torch.searchsorted(
                    positions, torch.tensor([start, end], device=positions.device)
                ).tolist()
                if first == last:
                    continue
                mine = widened(logits(slice(first, last))).log_softmax(-1) + shares[first:last, None].log()
                if mixed is None:
                    mixed = mine.new_full((end - start, mine.shape[1]), -torch.inf)
                at = positions[first:last] - start
                mixed[at] = torch.logaddexp(mixed[at], mine)
            return mixed

        return read


class TextTarget:
    """Nothing is known of the teacher but its text: the loss is the cross-entropy of the next token, at temperature 1,
    whatever the divergence and `kd_ratio`. Of the statistics only the loss and the student's entropy are known."""

    unknown = tuple(name for name in TokenStatistics._fields if name not in ("loss", "student_entropy"))

    def comparison(
        self, student: Projected, rows: int, divergence: Divergence, temperature: float, kd_ratio: float
    ) -> Compare:
        def compare(raw, part, labels, statistics, gradient):
            logits = student.finish(raw)
            log_probs = log_softmax(widened(logits), 1.0)  # (n, V)
            picked = labels[:, None]
            statistics.zero_()
            statistics[TokenStatistics._fields.index("loss")] = -log_probs.gather(1, picked)[:, 0]
            probs = log_probs.exp()
            statistics[TokenStatistics._fields.index("student_entropy")] = -(log_probs.mul_(probs)).sum(-1)
            if not gradient:
                return None
            grad = probs.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=probs.dtype))
            return student.head.to_raw(grad, logits)

        return compare

    def logits(self, vocab_size: int, rows: int) -> None:
        """None: no distribution is known."""


def _comparison(
    student: Projected,
    rows: int,
    settings: tuple[Divergence, float, float],
    read: Callable[[slice], torch.Tensor],
    finish: Callable[[torch.Tensor], torch.Tensor],
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Compare:
    """Compares with a teacher's whole distribution: `finish(read(part))` are its logits (n, V) at the positions `part`.

    Args:
        settings: divergence, temperature and kd_ratio.
        bias, scale, softcap: what `finish` applies, for the kernel.
    """
    divergence, temperature, kd_ratio = settings
    grads = None

    def compare(raw, part, labels, statistics, gradient):
        nonlocal grads
        teacher_raw = read(part)
        if divergence.kernel is not None and kernel.supports(raw.device, student.vocab_size):
            if gradient and grads is None:
                half = student.dtype if student.weight is not None else raw.dtype
                grads = torch.empty(rows, student.vocab_size, dtype=half, device=raw.device)
            grad = grads[: len(raw)] if gradient else None
            try:
                kernel.launch(
                    raw, teacher_raw, labels, grad, statistics, **divergence.kernel,
                    temperature=temperature, kd_ratio=kd_ratio,
                    student_bias=student.bias, teacher_bias=bias,
                    student_scale=student.head.scale, teacher_scale=scale,
                    student_softcap=student.head.softcap, teacher_softcap=softcap,
                )  # fmt: skip
                return grad
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever Triton raises if it can't build
                kernel.give_up(error)
        logits = student.finish(raw)
        values, grad = statistics_and_gradient(
            logits, finish(teacher_raw), labels, divergence, temperature, kd_ratio, gradient
        )
        statistics[:] = torch.stack(values)
        return student.head.to_raw(grad, logits) if gradient else None

    return compare
