"""The frozen teacher's forward, replayed on a GPU as a CUDA graph.

A training step is often bound by the CPU that launches its kernels, and a third of them are the teacher's, the same at
each step. Texts are padded on the right to one of a few lengths, which causal attention does not see, and each shape is
captured once.
"""

import math
import time
from collections import Counter

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from torch import nn

from gkd.generation.static import on_device
from gkd.io.errors import first_line
from gkd.models.heads import base_of, last_hidden_states

logger = get_logger(__name__)

Graph = tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]  # reads ids (B, L), writes hidden states (B, L, H)

# The first shapes are captured at once. Where texts end anywhere most come once: others are captured if they come again.
_GRAPHS_AT_ONCE, _USES_THAT_PAY, _MOST_GRAPHS = 4, 3, 32
# Longer micro-batches keep the GPU busy by themselves, and a graph holds on to the memory of its activations.
MOST_TOKENS = 4096


def padded_length(length: int) -> int:
    """Rounds up to one of 16 lengths an octave, or to 32."""
    step = max(32, 2 ** (length.bit_length() - 5))
    return -(-length // step) * step


class TeacherForward:
    """The teacher's last hidden states, by a CUDA graph where the model allows it, unless `enabled` is False."""

    def __init__(self, teacher: nn.Module, pad: int, enabled: bool):
        self.teacher, self.pad = teacher, pad
        self.seconds = 0.0  # spent on capturing
        device = next(teacher.parameters()).device
        self.enabled = enabled and device.type == "cuda" and getattr(base_of(teacher), "_can_compile_fullgraph", False)
        self._graphs: dict[tuple[int, int], Graph] = {}  # by (B, L)
        self._uses: Counter[tuple[int, int]] = Counter()  # of each shape
        self._pool = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """(B, L) ids and mask (None: right-padded) -> (B, L, H). The result is overwritten by the next call."""
        rows, length = input_ids.shape
        shape = rows, padded_length(length)
        if not self.enabled or attention_mask is not None or math.prod(shape) > MOST_TOKENS:
            return last_hidden_states(self.teacher, input_ids, attention_mask)
        self._uses[shape] += 1
        if not self._pays(shape):  # of the same shape, whose products have the same bits
            padded = F.pad(input_ids, (0, shape[1] - length), value=self.pad)
            return last_hidden_states(self.teacher, padded, None)[:, :length]
        if shape not in self._graphs:
            started = time.perf_counter()
            try:
                with on_device(input_ids.device):
                    self._graphs[shape] = self._capture(shape, input_ids.device)
            except RuntimeError as error:
                self.enabled = False
                self._graphs.clear()
                logger.warning(f"The teacher's forward can't be a CUDA graph: {first_line(error)}")
                return last_hidden_states(self.teacher, input_ids, attention_mask)
            self.seconds += time.perf_counter() - started
        graph, ids, hidden = self._graphs[shape]
        ids.fill_(self.pad)
        ids[:, :length].copy_(input_ids)
        graph.replay()
        return hidden[:, :length]

    def _pays(self, shape: tuple[int, int]) -> bool:
        """Whether a shape has a graph or gets one."""
        room = _MOST_GRAPHS if self._uses[shape] >= _USES_THAT_PAY else _GRAPHS_AT_ONCE
        return shape in self._graphs or len(self._graphs) < room

    def _capture(self, shape: tuple[int, int], device: torch.device) -> Graph:
        ids = torch.full(shape, self.pad, device=device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            last_hidden_states(self.teacher, ids, None)  # libraries initialise outside of the graph
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            hidden = last_hidden_states(self.teacher, ids, None)
        return graph, ids, hidden
