"""Reading few prompts: one forward that writes into the decoder's cache, on a GPU as a CUDA graph.

The forward of a few thousand tokens launches a thousand kernels that a GPU has done before the next one comes. Prompts are
padded to a few widths, so that a graph serves many; longer ones keep the GPU busy by themselves.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, StaticLayer

from gkd.models.graphs import side_stream

MOST_TOKENS = 4096  # of prompts that are read by a graph, padding included
_STEP = 64


def padded(prompts: torch.Tensor, mask: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Prompts (B, P) and their mask with padding on the left to a width that others have too; None if they are too many."""
    more = -prompts.shape[1] % _STEP
    if rows * (prompts.shape[1] + more) > MOST_TOKENS:
        return None
    prompts, mask = F.pad(prompts, (more, 0)), F.pad(mask, (more, 0))
    return torch.where(mask.bool(), prompts, prompts[:, -1:]), mask  # padding's own embedding may be anything


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """The positions (B, P) of left-padded prompts with this mask."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class GivenLayer(StaticLayer):
    """A layer's cache in memory that is there: keys and values (B, H, L, D)."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values = keys, values
        self.is_initialized = True


class _PromptLayer(GivenLayer):
    """Writes to the first columns, and gives back what it wrote."""

    def update(self, key_states, value_states, *args, **kwargs):
        width = key_states.shape[2]
        self.keys[:, :, :width].copy_(key_states)
        self.values[:, :, :width].copy_(value_states)
        return key_states.to(self.keys.dtype), value_states.to(self.values.dtype)

    def get_seq_length(self) -> int:
        return 0


class PromptPass:
    """Reads prompts of one width into a decoder's cache.

    Args:
        layers: keys and values of each layer, (B, H, L, D).
        forward: (ids, masks, positions, cache) -> logits (B, V) after the last ids.
        masks: from which tokens each token sees, a bool (B, 1, P, P), to what `forward` takes.
    """

    def __init__(self, layers: list, width: int, forward: Callable[..., torch.Tensor], masks: Callable[..., Any]):
        rows, device = len(layers[0][0]), layers[0][0].device
        self.cache = Cache(layers=[_PromptLayer(keys, values) for keys, values in layers])
        self.ids = torch.zeros(rows, width, dtype=torch.long, device=device)
        self.mask = torch.ones_like(self.ids)
        self.forward, self.masks = forward, masks
        self.graph = self.logits = None

    def __call__(self, prompts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits (b, V) of the first b rows; the others read padding."""
        self.ids.zero_()
        self.mask.fill_(1)
        self.ids[: len(prompts)], self.mask[: len(prompts)] = prompts, mask
        if self.graph is None:
            self._compute()
        else:
            self.graph.replay()
        return self.logits[: len(prompts)]

    def _compute(self) -> None:
        column = torch.arange(self.ids.shape[1], device=self.ids.device)
        seen = self.mask.bool()[:, None, None] & (column <= column[:, None])
        self.logits = self.forward(self.ids, self.masks(seen, column[:, None]), positions_of(self.mask), self.cache)

    def capture(self, pool: Any) -> None:
        """Calls replay a CUDA graph from here on."""
        with side_stream() as stream:
            self._compute()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            self._compute()
        self.graph = graph
