"""The student's forward in training, and its comparison with the teacher at the scored positions.

A step on a GPU is often bound by the CPU that launches its kernels, some thousands a micro-batch. Rows are trained on without
padding; where that gives a line of one of a few lengths (`gkd.models.packing`), forward and backward are replayed as CUDA
graphs. Where memory allows it, a layer keeps its activations for the backward and is not run again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from gkd.compat import run_inside_forward
from gkd.data.batch import Batch
from gkd.generation.static import CACHE_SHARE
from gkd.losses.objective import Objective
from gkd.losses.targets import Target, TextTarget
from gkd.models.graphs import MOST_TOKENS, Graphs, can_be_graphed, side_stream
from gkd.models.heads import LogitHead, base_of, hidden_at_scored, hidden_states_and_balance, last_hidden_states
from gkd.models.kernels import LayerKernels
from gkd.models.packing import Line, attends_by_row, can_pack, line_states
from gkd.runs.choices import SPARE_MEMORY, Choices
from gkd.teachers.base import Teacher
from gkd.training.metrics import Phases

logger = get_logger(__name__)

# (student's hidden states (N, Hs), teacher's target, next tokens (N,), student's head) -> what the objective computes
Measure = Callable[[torch.Tensor, Target, torch.Tensor, LogitHead], Any]

_TOKENS = 1024  # of the larger of two forwards whose memory is measured
_MARGIN = 0.1  # of a GPU's memory stays free, for the divergence and a layer's backward


@dataclass
class _Graph:
    """Forward and backward of a line: reads `line` and `grad`, writes `states` (1, T, H) and `grads` of `params`."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    line: Line
    states: torch.Tensor
    grad: torch.Tensor
    params: list[nn.Parameter]
    grads: list[torch.Tensor | None]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph: _Graph, *params):
        ctx.graph = graph
        graph.forward.replay()
        return graph.states.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        graph = ctx.graph
        graph.grad.copy_(grad)
        graph.backward.replay()
        # `graph` keeps a reference to them, so autograd copies or adds them and does not take them over.
        return None, *graph.grads


class StudentForward:
    """The student's last hidden states at a batch's scored positions, in training.

    Args:
        draws_noise: a forward in training mode draws random numbers.
        sharded: its weights are: then rows are padded, and all layers that may be checkpointed are.
    """

    def __init__(
        self, student: nn.Module, accelerator: Accelerator, draws_noise: bool, sharded: bool, choices: Choices
    ):
        self.model, self.accelerator, self.device = student, accelerator, accelerator.device
        self._draws_noise, self._sharded = draws_noise, sharded
        base = base_of(student)
        enabled = can_be_graphed(base, self.device) and not (sharded or getattr(base, "is_quantized", False))
        self._graphs = Graphs("The student's forward", student, enabled)  # which share the gradients that they write
        self.activations = KeptActivations(student, self.device, not sharded, shares=1 + enabled)
        self._choices = choices
        self._in_step = False  # of a student whose rows need no padding

    @property
    def seconds(self) -> float:
        """Spent on capturing."""
        return self._graphs.seconds

    @cached_property
    def packs(self) -> bool:
        """Whether its rows need no padding."""
        if self._sharded:
            return False
        with self.accelerator.autocast():
            return can_pack(self.model, self.device, "student", trains=True)

    @cached_property
    def _kernels(self) -> LayerKernels:
        with self.accelerator.autocast():
            return LayerKernels(self.model, "student", whole=not self._sharded)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Forward and backward of training run inside this context."""
        if self._choices.get(SPARE_MEMORY) == 0:
            self.release()
        with self._kernels.applied(), attends_by_row(self.model) if self.packs else nullcontext():
            self._in_step = self.packs
            try:
                yield
            finally:
                self._in_step = False

    def release(self) -> bool:
        """Gives up memory that only speed needs, for good; whether there was any."""
        had_graphs, self._graphs.enabled = self._graphs.enabled and self._in_step, False
        self._graphs.drop()
        return self.activations.give_up() or had_graphs

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Hidden states (N, H)."""
        if not self._in_step or batch.lengths is None or batch.attention_mask is not None:
            self.activations.checkpointed(batch.input_ids.numel())
            return self.padded(batch)
        line = Line.of(batch.input_ids, batch.scored, batch.lengths)
        return self._line_states(line)[0].index_select(0, line.scored)

    def padded(self, batch: Batch) -> torch.Tensor:
        """The same by the plain forward, in evaluation too."""
        forward = partial(last_hidden_states, self.model)
        return hidden_at_scored(forward, batch.input_ids, batch.attention_mask, batch.scored)

    def _line_states(self, line: Line) -> torch.Tensor:
        tokens = line.ids.shape[1]
        checkpointed = self.activations.checkpointed(tokens)
        graph = None
        # A checkpointed layer that draws would have to restore the random state, which a graph can't.
        if tokens <= MOST_TOKENS and not (checkpointed and self._draws_noise):
            graph = self._graphs.get((*line.shape, checkpointed), lambda: self._capture(line), self.device)
        if graph is None:
            return line_states(self.model, line)
        for buffer, values in zip(_read(graph.line), _read(line), strict=True):
            buffer.copy_(values)
        return _Replayed.apply(graph, *graph.params)

    def _capture(self, line: Line) -> _Graph:
        line = Line(*(values.clone() for values in _read(line)), line.longest, line.scored)
        body = base_of(self.model).base_model
        params = {name: p for name, p in body.named_parameters() if p.requires_grad}
        # Autograd remembers on which stream it met a leaf: the capture has leaves of its own, on the same memory.
        weights = {name: p.detach().requires_grad_() for name, p in params.items()}

        def forward() -> torch.Tensor:
            # A cast that autocast keeps from before the capture would never be made again.
            enabled = torch.is_autocast_enabled("cuda")
            with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=enabled, cache_enabled=False):
                return line_states(self.model, line, weights)

        def backward(states: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            return torch.autograd.grad(states, list(weights.values()), grad, allow_unused=True)

        with torch.random.fork_rng(devices=[self.device]), torch.enable_grad():
            with side_stream() as stream:
                states = forward()
                grads = backward(states, torch.zeros_like(states))
                if self._graphs.shared is None:
                    self._graphs.shared = [grad if grad is None else torch.empty_like(grad) for grad in grads]
                del states, grads
            graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[0], pool=self._graphs.pool, stream=stream):
                states = forward()
            grad = torch.zeros_like(states)
            with torch.cuda.graph(graphs[1], pool=self._graphs.pool, stream=stream):
                grads = backward(states, grad)
                pairs = [pair for pair in zip(self._graphs.shared, grads, strict=True) if pair[1] is not None]
                torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
        return _Graph(*graphs, line, states.detach(), grad, [*params.values()], self._graphs.shared)


def _read(line: Line) -> tuple[torch.Tensor, ...]:
    """What a forward reads of a line."""
    return line.ids, line.positions, line.ends


class KeptActivations:
    """Checkpointing, which `--gradient_checkpointing` allows, on the layers for which memory is short.

    A layer that is checkpointed computes its activations again in the backward, with the same result: so each
    micro-batch may have another number of them.

    Args:
        shares: how many pools of memory may hold activations at once: PyTorch's, and that of CUDA graphs.
        may_choose: False leaves the layers as they are.
    """

    def __init__(self, student: nn.Module, device: torch.device, may_choose: bool, shares: int = 1):
        self.student, self.device, self.shares = student, device, shares
        self._layers = [m for m in student.modules() if isinstance(m, GradientCheckpointingLayer)]
        self._asked = may_choose and bool(self._layers) and device.type == "cuda"
        self._chooses = False
        self._budget: float | None = None  # bytes
        self._per_token = 0.0  # bytes of a layer

    @property
    def _may_choose(self) -> bool:
        """From when training begins, where transformers switches checkpointing on."""
        self._chooses = self._chooses or (self._asked and all(layer.gradient_checkpointing for layer in self._layers))
        return self._chooses

    def checkpointed(self, tokens: int) -> int:
        """Has the first layers checkpointed, as many as a micro-batch of so many tokens needs, and returns their number."""
        if not self._may_choose:
            return sum(layer.gradient_checkpointing for layer in self._layers)
        if self._budget is None:
            self._measure()
        kept = min(int(self._budget / max(self._per_token * tokens, 1.0)), len(self._layers))
        return self._set(len(self._layers) - kept)

    def give_up(self) -> bool:
        """All layers are checkpointed from here on; whether that is new."""
        news = self._may_choose and self._budget != 0
        if news:
            self._budget = 0.0
            self._set(len(self._layers))
        return news

    def _set(self, checkpointed: int) -> int:
        for i, layer in enumerate(self._layers):
            layer.gradient_checkpointing = i < checkpointed
        return checkpointed

    def _measure(self) -> None:
        self._set(0)
        config = base_of(self.student).config.get_text_config()
        longest = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
        sizes = []
        with torch.random.fork_rng(devices=[self.device]), torch.enable_grad():
            # The first is not counted: with it autocast casts the weights, and libraries take what they need.
            for tokens in (longest // 2, longest // 2, longest):
                ids = torch.arange(tokens, device=self.device)[None] % config.vocab_size
                before = torch.cuda.memory_allocated(self.device)
                states = last_hidden_states(self.student, ids, None)
                sizes.append(torch.cuda.memory_allocated(self.device) - before)
                del states
        self._per_token = max(sizes[2] - sizes[1], 0) / (longest - longest // 2) / len(self._layers)
        gpu = torch.cuda.current_device() if self.device.index is None else self.device.index
        free, total = torch.cuda.mem_get_info(gpu)
        cap = torch.cuda.get_per_process_memory_fraction(gpu) * total
        allocated, reserved = torch.cuda.memory_allocated(gpu), torch.cuda.memory_reserved(gpu)
        free = min(free + reserved, cap) - allocated
        # The optimizer's two moments come with the first step, and gradients: with graphs, in their pool and beside it too.
        copies = 3 if self.shares == 1 else 5
        pending = sum(copies * p.nbytes for p in self.student.parameters() if p.requires_grad)
        self._budget = max(free - pending - (CACHE_SHARE + _MARGIN) * total, 0.0) / self.shares
        tokens = int(self._budget / max(self._per_token * len(self._layers), 1.0))
        logger.info(
            f"Activations are kept for the backward in micro-batches of up to {tokens} tokens, not computed twice."
        )


class Comparison:
    """The objective of a batch. In training, or if the student is sharded, methods run inside its wrapper's forward.

    Args:
        sharded: the student's weights are sharded.
        balance: also return the load-balancing loss of a mixture of experts.
        compares: the teacher is asked in `loss`; else it is the text's cross-entropy.
    """

    def __init__(
        self,
        objective: Objective,
        teacher: Teacher,
        phases: Phases,
        student: StudentForward,
        sharded: bool,
        balance: bool,
        compares: bool,
    ):
        self.objective, self.teacher, self.phases = objective, teacher, phases
        self.student, self.sharded, self.balance, self.compares = student, sharded, balance, compares

    def loss(self, batch: Batch, kd_ratio: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The summed loss, the summed `TokenStatistics` (6,), and the load-balancing loss or None."""
        balance = None

        def states_and_balance(batch: Batch) -> torch.Tensor:
            return hidden_at_scored(forward, batch.input_ids, batch.attention_mask, batch.scored)

        def forward(*inputs):
            nonlocal balance
            hidden, balance = hidden_states_and_balance(self.student.model, *inputs)
            return hidden

        measure = partial(self.objective.loss, kd_ratio=kd_ratio)
        states = states_and_balance if self.balance else self.student
        if self.compares:
            loss, statistics = self._compare(measure, batch, states)
        else:
            loss, statistics = self._beside(TextTarget(), measure, batch, states)
        return loss, statistics.sum(1), balance

    def measure(self, batch: Batch) -> torch.Tensor:
        """The `EvaluationStatistics` (9, N) of the scored positions."""
        return self._compare(self.objective.measure, batch, self.student.padded)

    def _compare(self, measure: Measure, batch: Batch, states: Callable[[Batch], torch.Tensor]) -> Any:
        self.phases.at("the teacher's forward")
        with self.teacher.target(batch) as target:
            return self._beside(target, measure, batch, states)

    def _beside(self, target: Target, measure: Measure, batch: Batch, states: Callable[[Batch], torch.Tensor]) -> Any:
        self.phases.at("the student's forward and the divergence")
        hidden = states(batch)
        labels = batch.next_ids
        head = LogitHead.of(self.student.model, gathered=self.sharded)

        def compute(hidden: torch.Tensor) -> Any:
            return measure(hidden, target, labels, head)

        if not self.sharded:
            return compute(hidden)
        # Inside the head's forward, ZeRO-3 and FSDP2 gather it once for all chunks of logits, whose number differs
        # between ranks, and once more for the backward.
        return run_inside_forward(head.head, head.head, compute, hidden)
