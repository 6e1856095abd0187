"""Teachers that are models in this process: by their name, then on the student's GPU or another device, in CPU memory,
sharded, or in the student itself."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.hooks import remove_hook_from_module
from accelerate.logging import get_logger
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import GenerationConfig

from gkd.compat import prepare_deepspeed, run_inside_forward
from gkd.config.teacher import PlacementArguments, TeacherArguments
from gkd.data.batch import Batch
from gkd.generation.generator import Generator, complete
from gkd.generation.sampling import sampling_fingerprint, weights_digest, writer_fingerprint
from gkd.generation.static import device_memory
from gkd.losses.targets import HiddenTarget, Target
from gkd.models import loading
from gkd.models.heads import LogitHead, check_projection, modes_kept
from gkd.models.pairing import Side
from gkd.models.sharding import gathered_head, prepare_fsdp2, shard_layers
from gkd.models.weights import check_adapter_weights, rehearse
from gkd.teachers.ahead import STATES_SHARE, joined, read_together
from gkd.teachers.base import Teacher
from gkd.teachers.forward import TeacherForward

logger = get_logger(__name__)


class NamedTeacher(Teacher):
    """A model by its name or folder, before its weights load; or, in training, the student without its adapter."""

    def __init__(self, args: TeacherArguments):
        self.args = args
        self._is_student = getattr(args, "teacher_is_student", False)  # only `gkd train` has this flag

    def side(self, student: Side, args: Any) -> Side:
        return Side.of_teacher(self.args)

    def rehearse(self) -> None:
        name, adapter = self.args.teacher_model_name_or_path, self.args.teacher_adapter
        model = None if self._is_student else rehearse(name, loading.teacher_options(self.args))
        if adapter is not None:  # `side` has checked that it is one
            check_adapter_weights(adapter, model)

    def load(self) -> nn.Module | None:
        """The frozen model, on the CPU unless its weights are packed."""
        return None if self._is_student else loading.load_teacher(self.args)


def place_teacher(
    model: nn.Module | Teacher,
    accelerator: Accelerator,
    args: TeacherArguments,
    pad: int,
    zero3: bool = False,
    fsdp: bool = False,
) -> Teacher:
    """Puts a frozen teacher where the flags want it; without `PlacementArguments`, on its device or that of the student.

    Args:
        model: the student itself where it is its own teacher. A `Teacher` places the models that it holds.
        pad: the id of padding.
        zero3, fsdp: how the student is sharded, and the teacher with it.

    Raises ValueError for an architecture whose logits are not head(hidden states), or without layers to shard.
    """
    if isinstance(model, Teacher):
        model.place(lambda part: place_teacher(part, accelerator, args, pad, zero3, fsdp))
        return model
    if not isinstance(args, PlacementArguments):
        args = PlacementArguments(teacher_cuda_graph=False, teacher_device=args.teacher_device)
    common = {"accelerator": accelerator, "pad": pad, "cuda_graph": args.teacher_cuda_graph}
    shards = args.teacher_sharded and accelerator.num_processes > 1
    if zero3 or fsdp or shards:
        whole = all(p.numel() for p in model.parameters())  # ZeRO-3 may have sharded them while they loaded
        common["weights"] = weights_digest(model) if whole and args.caches_teacher_text else None
    if zero3:
        return ShardedTeacher(prepare_deepspeed(model, accelerator), zero3=True, **common)
    if fsdp:
        return ShardedTeacher(prepare_fsdp2(model, accelerator), **common)
    if shards:
        check_projection(model, "teacher")  # while one rank can still call it alone
        return ShardedTeacher(shard_layers(model, accelerator, device_memory(accelerator.device)), **common)
    if args.teacher_sharded:
        logger.warning("--teacher_sharded has no effect on one GPU: there is nobody to share the teacher with.")
    if args.teacher_is_student:
        # No graph of the forward: the weights move when DeepSpeed takes the student over.
        teacher = OwnBase(model, **(common | {"cuda_graph": False}))
    elif args.teacher_offload:
        teacher = OffloadedTeacher(model, **common)
    elif len(args.teacher_devices) > 1:
        teacher = SpreadTeacher(model, args.teacher_devices, **(common | {"cuda_graph": False}))
    elif args.teacher_devices:
        teacher = TeacherElsewhere(model, device=args.teacher_devices[0], **common)
    else:
        teacher = LocalTeacher(model, **common)
    with teacher.visit():
        check_projection(teacher.inner, "teacher")
    return teacher


class LocalTeacher(Teacher):
    """A model in this process: whole on the student's device, in its own dtype."""

    writes = True
    gives_hidden = True
    on_one_device = True
    _head: LogitHead | None = None  # a copy on the student's device, where the model's own may be elsewhere

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        pad: int,
        cuda_graph: bool,
        device: torch.device | None = None,
    ):
        self.accelerator, self.student_device = accelerator, accelerator.device
        self.device = device or accelerator.device
        self.model, self.inner = model, accelerator.unwrap_model(model)
        self._arrive()
        self.forward = self._states = TeacherForward(
            self.inner, pad, cuda_graph and self.stays, whole=self.on_one_device
        )

    def _arrive(self) -> None:
        loading.move(self.inner, self.device)

    @property
    def capture_seconds(self) -> float:
        return self.forward.seconds

    def visit(self) -> AbstractContextManager:
        """Inside the context, `inner` computes as the teacher, and is on its device."""
        return nullcontext()

    @cached_property
    def packs(self) -> bool:
        with self.visit(), torch.autocast(self.device.type, enabled=False):
            return self.forward.can_pack(self.device)

    @property
    def size(self) -> tuple[int, int]:
        return loading.size_of(self.inner)

    def decode_by(self, generator: Generator) -> None:
        self.generator = generator

    def write(self, prompts, mask, config, seed) -> tuple[torch.Tensor, torch.Tensor]:
        model, accelerator, generator = self.model, self.accelerator, self.generator
        with self.visit():
            return complete(model, accelerator, generator, prompts, mask, config, seed, device=self.device)

    def identity(self, config: GenerationConfig) -> bytes | None:
        return writer_fingerprint(self.inner, config)

    @contextmanager
    def head(self) -> Iterator[LogitHead]:
        """The head, with weights on the student's device."""
        yield self._head or LogitHead.of(self.inner)

    @contextmanager
    def target(self, batch: Batch) -> Iterator[Target]:
        output = batch.teacher_output
        if output is None:
            output = self.hidden(batch)  # (N, Ht)
        with self.head() as head:
            yield HiddenTarget(output.to(self.student_device), head) if isinstance(output, torch.Tensor) else output

    def hidden(self, batch: Batch) -> torch.Tensor:
        """The last hidden states (N, Ht) at a batch's scored positions, on the student's device."""
        with self.visit():
            return self._hidden(batch)

    @torch.no_grad()
    def _hidden(self, batch: Batch) -> torch.Tensor:
        inputs = (tensor if tensor is None else tensor.to(self.device) for tensor in batch.teacher_inputs)
        with torch.autocast(self.device.type, enabled=False):  # the teacher computes in its own dtype
            prompted = batch.teacher_input_ids is not None
            return self._states(*inputs, batch.lengths_for_teacher, prompted).to(self.student_device)


class _PreparingTeacher(LocalTeacher):
    """Computes the hidden states of all micro-batches of a step in one visit, before it trains."""

    _prepared: tuple[Batch, ...] = ()

    def prepare(self, batches: Iterable[Batch]) -> None:
        """At most `STATES_SHARE` of the GPU's memory is for a step's hidden states; the others wait in CPU memory."""
        for batch in self._prepared:  # of the step before
            batch.teacher_output = None
        self._prepared = tuple(batches)
        room = STATES_SHARE * device_memory(self.student_device)
        with self.visit():
            for together in self._forwards(list(self._prepared)):
                whole = together[0] if len(together) == 1 else joined(together, self.forward.pad)
                hidden = self._hidden(whole)  # (N, Ht)
                room -= hidden.nbytes
                hidden = hidden if room >= 0 else hidden.cpu()
                sizes = [len(batch.teacher_inputs[2]) for batch in together]
                for batch, output in zip(together, hidden.split(sizes), strict=True):
                    batch.teacher_output = output

    def _forwards(self, batches: list[Batch]) -> list[list[Batch]]:
        """The batches, in lists that one forward reads."""
        return [[batch] for batch in batches]


class ShardedTeacher(_PreparingTeacher):
    """Over the ranks, by ZeRO-3 or FSDP2: the wrapper's forward gathers weights. `weights`: their digest when whole, if needed."""

    sharded = True
    on_one_device = False
    stays = False

    def __init__(self, model: nn.Module, weights: Any, zero3: bool = False, **common):
        self._weights, self._zero3 = weights, zero3
        super().__init__(model, **common)
        self._run = partial(run_inside_forward, self.model, self.inner)
        self._states = partial(self._run, self.forward)

    @cached_property
    def packs(self) -> bool:
        with torch.autocast(self.device.type, enabled=False):
            return self._run(self.forward.can_pack, self.device)

    def identity(self, config: GenerationConfig) -> bytes | None:
        return None if self._weights is None else sampling_fingerprint(self._weights, config)

    def _arrive(self) -> None:
        """Sharding has put the weights in place."""

    def _forwards(self, batches: list[Batch]) -> list[list[Batch]]:
        """As many on each rank; those with fewer read one token."""
        forwards = read_together(batches)
        count = torch.tensor([len(forwards)], device=self.student_device)
        token = torch.zeros(1, 1, dtype=torch.long, device=self.student_device)
        idle = [Batch(token, token, token[0])]
        return forwards + [idle] * (int(self.accelerator.gather(count).max()) - len(forwards))

    @contextmanager
    def head(self) -> Iterator[LogitHead]:
        head = LogitHead.of(self.inner, gathered=True)
        with gathered_head(self.inner, head.head, self._zero3):
            yield head


def _head_copy(model: nn.Module, device: torch.device) -> LogitHead:
    """The head of a frozen model with weights of its own, on a device."""
    head = LogitHead.of(model)
    copy = remove_hook_from_module(deepcopy(head.head), recurse=True)  # a hook would move its input away
    return replace(head, head=copy.requires_grad_(False).to(device))


class TeacherElsewhere(LocalTeacher):
    """On another device than the student, which has a copy of the head."""

    def _arrive(self) -> None:
        super()._arrive()
        self._head = _head_copy(self.inner, self.student_device)


class SpreadTeacher(TeacherElsewhere):
    """Too large for one device: layers on each of several GPUs, one after the other. The student has a copy of the head."""

    on_one_device = False

    def __init__(self, model: nn.Module, devices: list[torch.device], **common):
        self._devices = devices
        super().__init__(model, device=devices[0], **common)

    def _arrive(self) -> None:
        loading.spread(self.inner, self._devices)
        self._head = _head_copy(self.inner, self.student_device)


class OffloadedTeacher(_PreparingTeacher):
    """In CPU memory between its visits; its head has a copy on the device. At the end of a visit nothing is copied back."""

    stays = False

    def _arrive(self) -> None:
        self._head = _head_copy(self.inner, self.device)
        for buffer in self.inner.buffers():  # small: they stay
            buffer.data = buffer.data.to(self.device)
        self._weights = list(self.inner.parameters())
        pinned = self.device.type == "cuda"
        self._cpu_weights = [w.data.cpu().pin_memory() if pinned else w.data.cpu() for w in self._weights]
        self._stays = 0
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
            if not self._on_device:
                self._come()
            yield

    def _come(self) -> None:
        for weight, cpu_weight in zip(self._weights, self._cpu_weights, strict=True):
            weight.data = cpu_weight.to(self.device, non_blocking=True)
        self._on_device = True

    def _leave(self) -> None:
        for weight, cpu_weight in zip(self._weights, self._cpu_weights, strict=True):
            weight.data = cpu_weight
        self._on_device = False


class OwnBase(_PreparingTeacher):
    """The student without its adapter: its weights serve both."""

    def _arrive(self) -> None:
        """The trainer moves the student."""

    def identity(self, config: GenerationConfig) -> bytes | None:
        return writer_fingerprint(self.inner, config, without_adapter=True)

    @contextmanager
    def visit(self) -> Iterator[None]:
        with modes_kept(self.inner):
            self.inner.eval()
            with self.inner.disable_adapter():
                yield

    @contextmanager
    def head(self) -> Iterator[LogitHead]:
        head = LogitHead.of(self.inner)
        module = head.head
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            module = module.original_module
        yield replace(head, head=module)
