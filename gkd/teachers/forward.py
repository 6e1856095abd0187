"""The frozen teacher's forward, replayed on a GPU as a CUDA graph.

A training step is often bound by the CPU that launches its kernels, and a third of them are the teacher's, the same at
each step. Texts are padded on the right to one of a few lengths, which causal attention does not see, and each shape is
captured once.
"""

import time
from dataclasses import dataclass

import torch
from accelerate.logging import get_logger
from torch import nn

from gkd.generation.static import on_device
from gkd.io.errors import first_line
from gkd.models.heads import base_of, last_hidden_states

logger = get_logger(__name__)

# Longer micro-batches keep the GPU busy by themselves, and a graph holds on to the memory of its activations.
MOST_TOKENS = 4096


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    input_ids: torch.Tensor  # (B, L)
    hidden: torch.Tensor  # (B, L, H)


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
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._pool = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """(B, L) ids and mask (None: right-padded) -> (B, L, H). The result is overwritten by the next call."""
        rows, length = input_ids.shape
        width = padded_length(length)
        if not self.enabled or attention_mask is not None or rows * width > MOST_TOKENS:
            return last_hidden_states(self.teacher, input_ids, attention_mask)
        captured = self._graphs.get((rows, width))
        if captured is None:
            started = time.perf_counter()
            try:
                with on_device(input_ids.device):
                    captured = self._capture(rows, width, input_ids.device)
            except RuntimeError as error:
                self.enabled = False
                self._graphs.clear()
                logger.warning(f"The teacher's forward can't be a CUDA graph: {first_line(error)}")
                return last_hidden_states(self.teacher, input_ids, attention_mask)
            self.seconds += time.perf_counter() - started
            self._graphs[rows, width] = captured
        captured.input_ids.fill_(self.pad)
        captured.input_ids[:, :length].copy_(input_ids)
        captured.graph.replay()
        return captured.hidden[:, :length]

    def _capture(self, rows: int, width: int, device: torch.device) -> _Graph:
        ids = torch.full((rows, width), self.pad, device=device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            last_hidden_states(self.teacher, ids, None)  # libraries initialise outside of the graph
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            hidden = last_hidden_states(self.teacher, ids, None)
        return _Graph(graph, ids, hidden)
