"""The student's forward in training: rows without padding, forward and backward replayed as CUDA graphs.

A step on a GPU is often bound by the CPU that launches its kernels, some thousands a micro-batch. Where a micro-batch is a
line of one of a few lengths (`gkd.models.packing`), all of them are launched at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from accelerate import Accelerator
from torch import nn

from gkd.data.batch import Batch
from gkd.models.graphs import MOST_TOKENS, Graphs, can_be_graphed, side_stream
from gkd.models.heads import base_of, hidden_at_scored, last_hidden_states
from gkd.models.kernels import LayerKernels
from gkd.models.packing import Line, attends_by_row, can_pack, line_states
from gkd.runs.choices import SPARE_MEMORY, Choices
from gkd.training.activations import KeptActivations


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
