"""The frozen teacher's forward: rows without padding where that can be, replayed on a GPU as a CUDA graph.

A training step is often bound by the CPU that launches its kernels, and a third of them are the teacher's, the same at
each step. Texts are filled up to one of a few lengths, which causal attention does not see, and each shape is captured
once.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from gkd.models.graphs import MOST_TOKENS, Graphs, can_be_graphed, on_device, side_stream
from gkd.models.heads import base_of, hidden_at_scored, last_hidden_states
from gkd.models.kernels import LayerKernels
from gkd.models.packing import Line, attends_by_row, can_pack, line_states, padded_length
from gkd.teachers.prefix import SharedPrefix


class TeacherForward:
    """The teacher's last hidden states.

    Args:
        pad: the id that fills texts up.
        enabled: by a CUDA graph, where the model allows it.
        whole: all weights are on one device.
    """

    def __init__(self, teacher: nn.Module, pad: int, enabled: bool, whole: bool = True):
        self.teacher, self.pad = teacher, pad
        self.device = next(teacher.parameters()).device
        enabled = enabled and can_be_graphed(base_of(teacher), self.device)
        self._graphs = Graphs("The teacher's forward", teacher, enabled)
        self._whole = whole
        self._packs: bool | None = None  # once it is known

    @property
    def seconds(self) -> float:
        """Spent on capturing."""
        return self._graphs.seconds

    @torch.no_grad()
    def __call__(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        scored: torch.Tensor,
        lengths: torch.Tensor | None = None,
        prompted: bool = False,
    ) -> torch.Tensor:
        """Hidden states (N, H) at flat positions (N,) of ids (B, L); the next call may overwrite them.

        Args:
            mask: (B, L), or None: right-padded.
            lengths: on the CPU, of the rows of right-padded ids, which then may be packed.
            prompted: rows have prompts for the teacher alone, which may begin alike.
        """
        with on_device(ids.device), self._kernels.applied():  # Triton launches on the current device
            if prompted and self._whole and (length := self._prefix.length(ids, scored)):
                return self._from_prefix(ids, mask, scored, lengths, length)
            return self._states(ids, mask, scored, lengths)

    @cached_property
    def _prefix(self) -> SharedPrefix:
        return SharedPrefix(self.teacher)

    def _from_prefix(self, ids, mask, scored, lengths, length: int) -> torch.Tensor:
        """The states by the beginning that rows share; the first time both ways."""
        prefix = self._prefix
        if prefix.works:
            return prefix.states(ids, mask, scored, length)
        expected = self._states(ids, mask, scored, lengths)
        try:
            states = prefix.states(ids, mask, scored, length)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any: an architecture may keep something else than keys and values
            states = error
        return states if prefix.check(states, expected) else expected

    @cached_property
    def _kernels(self) -> LayerKernels:
        return LayerKernels(self.teacher, "teacher", self._whole)

    def _states(self, ids, mask, scored, lengths) -> torch.Tensor:
        if lengths is None or mask is not None or not self.can_pack(ids.device):
            return hidden_at_scored(self._padded_states, ids, mask, scored)
        line = Line.of(ids, scored, lengths)

        def states(ids, positions, ends) -> torch.Tensor:
            return line_states(self.teacher, Line(ids, positions, ends, line.longest, line.scored))

        with attends_by_row(self.teacher):
            return self._replayed(line.shape, states, line.ids, line.positions, line.ends)[0].index_select(
                0, line.scored
            )

    def can_pack(self, device: torch.device) -> bool:
        """Whether rows on a device may be packed; a few tokens show it, the first time."""
        if self._packs is None:
            self._packs = can_pack(self.teacher, device, "teacher")
        return self._packs

    def _padded_states(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(B, L) ids and mask -> (B, L, H)."""
        if not self._graphs.enabled or mask is not None:
            return last_hidden_states(self.teacher, ids, mask)
        length = ids.shape[1]  # products of one shape have the same bits, with a graph and without
        padded = F.pad(ids, (0, padded_length(length) - length), value=self.pad)
        states = self._replayed(padded.shape, lambda ids: last_hidden_states(self.teacher, ids, None), padded)
        return states[:, :length]

    def _replayed(self, key: tuple[int, ...], states, *inputs: torch.Tensor) -> torch.Tensor:
        """`states(*inputs)`, by the graph of this key if there is one."""

        def capture():
            buffers = [tensor.clone() for tensor in inputs]
            with side_stream() as stream:
                states(*buffers)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._graphs.pool, stream=stream):
                output = states(*buffers)
            return graph, buffers, output

        small = inputs[0].numel() <= MOST_TOKENS
        if not small or (captured := self._graphs.get(key, capture, inputs[0].device)) is None:
            return states(*inputs)
        graph, buffers, output = captured
        for buffer, tensor in zip(buffers, inputs, strict=True):
            buffer.copy_(tensor)
        graph.replay()
        return output
