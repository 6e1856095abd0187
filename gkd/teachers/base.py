"""The teacher in training, wherever it is: on the student's GPU, another device, in CPU memory, over all ranks, or in the
student itself.

What training asks of it: the hidden states at scored positions, its head beside the student, and that it writes text.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn

from gkd.data.batch import Batch
from gkd.models.heads import LogitHead
from gkd.teachers.forward import TeacherForward

logger = get_logger(__name__)


class Teacher:
    """Whole on the student's device, in its own dtype.

    Attributes:
        model, inner: as it is wrapped, and without its wrapper.
        forward: ids to hidden states, see TeacherForward.
        sharded: over the ranks, which must then run it in step.
        stays: its weights stay where they are, so that its forward and its decoding may be CUDA graphs.
    """

    sharded = False
    stays = True

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        pad: int,
        cuda_graph: bool,
        device: torch.device | None = None,
    ):
        self.student_device = accelerator.device
        self.device = device or accelerator.device
        self.model, self.inner = model, accelerator.unwrap_model(model)
        self._arrive()
        self.forward = TeacherForward(self.inner, pad, cuda_graph and self.stays)

    def _arrive(self) -> None:
        if not getattr(self.inner, "is_quantized", False):  # packed weights were loaded to where they stay
            self.inner.to(self.device)

    @property
    def capture_seconds(self) -> float:
        """Spent so far on capturing CUDA graphs of its forward."""
        return self.forward.seconds

    def stay(self) -> AbstractContextManager:
        """While it lasts, weights that come to the device stay there."""
        return nullcontext()

    def visit(self) -> AbstractContextManager:
        """While it lasts, `inner` is the teacher, and on its device."""
        return nullcontext()

    @contextmanager
    def writing(self) -> Iterator[tuple[nn.Module, torch.device]]:
        """The model, as wrapped, and the device where it reads prompts."""
        with self.visit():
            yield self.model, self.device

    @contextmanager
    def head(self) -> Iterator[LogitHead]:
        """The head, with weights on the student's device."""
        yield LogitHead.of(self.inner)

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Called before an optimizer step trains: may put the result of `hidden` into its batches, as `teacher_output`."""

    def hidden(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, scored: torch.Tensor
    ) -> torch.Tensor:
        """ids and mask (B, L), flat positions (N,) -> last hidden states (N, Ht) on the student's device."""
        with self.visit():
            return self._hidden(input_ids, attention_mask, scored)

    @torch.no_grad()
    def _hidden(self, input_ids, attention_mask, scored) -> torch.Tensor:
        with torch.autocast(self.device.type, enabled=False):  # the teacher computes in its own dtype
            ids, scored = input_ids.to(self.device), scored.to(self.device)
            mask = None if attention_mask is None else attention_mask.to(self.device)
            states = self._states(ids, mask).flatten(0, 1)  # (B · L, Ht)
            return states.index_select(0, scored).to(self.student_device)

    def _states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return self.forward(input_ids, attention_mask)


class NoTeacher:
    """Nobody: what it would say is known ahead (--teacher_cache)."""

    model = inner = None
    sharded, stays = False, True
    capture_seconds = 0.0

    def stay(self) -> AbstractContextManager:
        return nullcontext()

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Nothing to do."""

    @contextmanager
    def head(self) -> Iterator[None]:
        yield None
