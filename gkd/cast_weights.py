"""fp32 weights under autocast, cast once a generation instead of once a token."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn


class CastWeights:
    """Copies of a model's linear weights in autocast's dtype, always at the same addresses, so that a graph may read them.

    Autocast casts a weight each time it is multiplied: reading 4 bytes, writing 2 and reading them again, where a decoding
    step could read 2. The products are the same to the last bit. Takes 2 bytes a weight until it is dropped.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        dtype = torch.get_autocast_dtype(device.type)
        self._weights: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []
        self._layers: list[tuple[nn.Linear, torch.Tensor, torch.Tensor | None]] = []
        if not torch.is_autocast_enabled(device.type):
            return
        for layer in model.modules():
            if type(layer) is nn.Linear and layer.weight.dtype is torch.float32 and "forward" not in vars(layer):
                bias = None if layer.bias is None else self._copy_of(layer.bias, dtype)
                self._layers.append((layer, self._copy_of(layer.weight, dtype), bias))

    def _copy_of(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        self._weights.append(weight.detach())
        self._copies.append(torch.empty_like(weight, dtype=dtype, requires_grad=False))
        return self._copies[-1]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Brings the copies up to date, and lets the layers compute with them while this lasts."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._weights)
        try:
            for layer, weight, bias in self._layers:
                layer.forward = lambda x, weight=weight, bias=bias: F.linear(x, weight, bias)
            yield
        finally:
            for layer, *_ in self._layers:
                vars(layer).pop("forward", None)
