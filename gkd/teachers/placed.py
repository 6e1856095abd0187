"""Teachers that are not simply on the student's device: elsewhere, in CPU memory, over all ranks, or in the student."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.hooks import remove_hook_from_module
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from gkd.compat import prepare_deepspeed, run_inside_forward
from gkd.config.training import GKDArguments
from gkd.data.batch import Batch
from gkd.models.heads import LogitHead, check_projection
from gkd.models.sharding import gathered_head, prepare_fsdp2, shard_layers
from gkd.teachers.base import Teacher, logger


def place_teacher(
    model: nn.Module, accelerator: Accelerator, args: GKDArguments, pad: int, zero3: bool, fsdp: bool
) -> "Teacher":
    """Puts a frozen teacher where the flags want it; `model` is the student itself where it is to be its own teacher.

    Args:
        pad: the id of padding.
        zero3, fsdp: how the student is sharded, and the teacher with it.

    Raises:
        ValueError: an architecture whose logits are not head(hidden states), or without layers to shard.
    """
    common = {"accelerator": accelerator, "pad": pad, "cuda_graph": args.teacher_cuda_graph}
    if zero3:
        return ShardedTeacher(prepare_deepspeed(model, accelerator), zero3=True, **common)
    if fsdp:
        return ShardedTeacher(prepare_fsdp2(model, accelerator), **common)
    if args.teacher_sharded and accelerator.num_processes > 1:
        check_projection(model, "teacher")  # while it can be called on its own
        return ShardedTeacher(shard_layers(model, accelerator), **common)
    if args.teacher_sharded:
        logger.warning("--teacher_sharded has no effect on one GPU: there is nobody to share the teacher with.")
    if args.teacher_is_student:
        # No graph of the forward: the weights move when DeepSpeed takes the student over.
        teacher = OwnBase(model, **(common | {"cuda_graph": False}))
    elif args.teacher_offload:
        teacher = OffloadedTeacher(model, **common)
    elif args.teacher_device is not None:
        teacher = TeacherElsewhere(model, device=torch.device(args.teacher_device), **common)
    else:
        teacher = Teacher(model, **common)
    with teacher.visit():
        check_projection(teacher.inner, "teacher")
    return teacher


class ShardedTeacher(Teacher):
    """Over the ranks, by ZeRO-3 or FSDP2: the wrapper's forward gathers weights."""

    sharded = True
    stays = False

    def __init__(self, model: nn.Module, zero3: bool = False, **common):
        self._zero3 = zero3
        super().__init__(model, **common)

    def _arrive(self) -> None:
        """Sharding has put the weights in place."""

    @contextmanager
    def head(self) -> Iterator[LogitHead]:
        head = LogitHead.of(self.inner, gathered=True)
        with gathered_head(self.inner, head.head, self._zero3):
            yield head

    def _states(self, input_ids, attention_mask):
        return run_inside_forward(self.model, self.inner, self.forward, input_ids, attention_mask)


def _head_copy(model: nn.Module, device: torch.device) -> LogitHead:
    """The head of a frozen model with weights of its own, on a device."""
    head = LogitHead.of(model)
    copy = remove_hook_from_module(deepcopy(head.head), recurse=True)  # a hook would move its input away
    return replace(head, head=copy.requires_grad_(False).to(device))


class TeacherElsewhere(Teacher):
    """On another device than the student, which has a copy of the head."""

    def _arrive(self) -> None:
        super()._arrive()
        self._head = _head_copy(self.inner, self.student_device)

    @contextmanager
    def head(self) -> Iterator[LogitHead]:
        yield self._head


class _PreparingTeacher(Teacher):
    """Computes the hidden states of all micro-batches of a step in one visit."""

    def prepare(self, batches: Iterable[Batch]) -> None:
        with self.visit():
            for batch in batches:
                batch.teacher_output = self._hidden(*batch.teacher_inputs)  # (N, Ht)


class OffloadedTeacher(_PreparingTeacher):
    """In CPU memory between its visits; its head has a copy on the device. Leaving, nothing is copied back."""

    stays = False

    def _arrive(self) -> None:
        self._head = _head_copy(self.inner, self.device)
        for buffer in self.inner.buffers():  # small: they stay
            buffer.data = buffer.data.to(self.device)
        self._weights = list(self.inner.parameters())
        self._kept = [weight.data.cpu() for weight in self._weights]
        if self.device.type == "cuda":
            self._kept = [weight.pin_memory() for weight in self._kept]
        self._stays, self._here = 0, True
        self._leave()

    @contextmanager
    def stay(self) -> Iterator[None]:
        self._stays += 1
        try:
            yield
        finally:
            self._stays -= 1
            if not self._stays:
                self._leave()

    @contextmanager
    def visit(self) -> Iterator[None]:
        with self.stay():
            if not self._here:
                self._come()
            yield

    def _come(self) -> None:
        for weight, kept in zip(self._weights, self._kept, strict=True):
            weight.data = kept.to(self.device, non_blocking=True)
        self._here = True

    def _leave(self) -> None:
        if self._here:
            for weight, kept in zip(self._weights, self._kept, strict=True):
                weight.data = kept
        self._here = False

    @contextmanager
    def head(self) -> Iterator[LogitHead]:
        yield self._head


class OwnBase(_PreparingTeacher):
    """The student without its adapter: its weights serve both."""

    def _arrive(self) -> None:
        """The student goes where it trains by itself."""

    @contextmanager
    def visit(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.inner.modules()]
        self.inner.eval()
        try:
            with self.inner.disable_adapter():
                yield
        finally:
            for module, training in modes:
                module.training = training

    @contextmanager
    def head(self) -> Iterator[LogitHead]:
        head = LogitHead.of(self.inner)
        module = head.head
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            module = module.original_module
        yield replace(head, head=module)
