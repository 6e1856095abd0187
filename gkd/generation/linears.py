"""Faster linear layers while a model generates."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

_FEW_ROWS = 64  # up to this number, `linear_for_few_rows` is faster than F.linear


def free_linears(model: nn.Module) -> list[nn.Linear]:
    """The plain linear layers of `model` whose `forward` has not been replaced, for example by a hook."""
    return [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]


@contextmanager
def computed_by(
    function: Callable[[nn.Linear, torch.Tensor], torch.Tensor], layers: list[nn.Linear]
) -> Iterator[None]:
    """Inside the context, each of `layers` returns function(layer, x)."""
    try:
        for layer in layers:
            layer.forward = partial(function, layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


class CastWeights:
    """Copies of fp32 weights in autocast's dtype, at fixed addresses, so that a CUDA graph may read them.

    Autocast casts a weight at each product: it reads 4 bytes, writes 2 and reads them again, where a decoding step needs
    to read 2. Products are equal to the last bit. A layer's copy is created at its first call.
    """

    def __init__(self):
        self.copies: dict[nn.Linear, list[torch.Tensor]] = {}  # weight, and bias if there is one

    def used_by(self, layers: list[nn.Linear]) -> AbstractContextManager:
        """Updates the copies; inside the context, the layers compute with them."""
        weights = [p.detach() for layer in self.copies for p in layer.parameters(recurse=False)]
        if weights:
            torch._foreach_copy_([copy for copies in self.copies.values() for copy in copies], weights)
        return computed_by(self._forward, layers)

    @staticmethod
    def of(layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The copies with which `layer` computes now, of its weight and bias; None if it has none."""
        casts = getattr(getattr(vars(layer).get("forward"), "func", None), "__self__", None)
        copies = casts.copies.get(layer) if isinstance(casts, CastWeights) else None
        return copies and (copies[0], copies[1] if len(copies) > 1 else None)

    def _forward(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):  # a model may switch autocast off for a part
            return F.linear(x, layer.weight, layer.bias)
        if layer not in self.copies:
            dtype = torch.get_autocast_dtype(kind)
            self.copies[layer] = [p.detach().to(dtype) for p in layer.parameters(recurse=False)]
        return F.linear(x, *self.copies[layer])


def linear_for_few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear, x: (..., in) -> (..., out), computed as (W xᵀ)ᵀ for few rows.

    A decoding step multiplies each weight with a handful of rows. For x Wᵀ a CPU's BLAS first repacks the weight, which
    takes as long as the product; W xᵀ takes about half of the time.
    """
    if x.numel() > _FEW_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    out = (weight @ x.reshape(-1, x.shape[-1]).T).T.contiguous().view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out.add_(bias)


def quick_linears(model: nn.Module, device: torch.device) -> AbstractContextManager:
    """Inside the context, the linear layers of `model` compute with `linear_for_few_rows`, on a CPU."""
    if device.type != "cpu":
        return nullcontext()
    return computed_by(lambda layer, x: linear_for_few_rows(x, layer.weight, layer.bias), free_linears(model))
