"""Linear layers that compute in another way while a model generates."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def free_linears(model: nn.Module) -> list[nn.Linear]:
    """The plain linear layers of `model`. Those with a `forward` of their own, by a hook say, are left alone."""
    return [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]


@contextmanager
def computed_by(
    function: Callable[[nn.Linear, torch.Tensor], torch.Tensor], layers: list[nn.Linear]
) -> Iterator[None]:
    """Each of `layers` puts out function(layer, x) while this lasts."""
    try:
        for layer in layers:
            layer.forward = partial(function, layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


class CastWeights:
    """Copies of fp32 weights in autocast's dtype, always at the same addresses, so that a graph may read them.

    Autocast casts a weight each time it is multiplied: it reads 4 bytes, writes 2 and reads them again, where a decoding
    step could read 2. The products are the same to the last bit. A layer's copy is made when it is first called.
    """

    def __init__(self):
        self.copies: dict[nn.Linear, list[torch.Tensor]] = {}  # weight, and bias if there is one

    @contextmanager
    def used_by(self, layers: list[nn.Linear]) -> Iterator[None]:
        """Brings the copies up to date, and lets the layers compute with them while this lasts."""
        weights = [p.detach() for layer in self.copies for p in layer.parameters(recurse=False)]
        if weights:
            torch._foreach_copy_([copy for copies in self.copies.values() for copy in copies], weights)
        with computed_by(self._forward, layers):
            yield

    def _forward(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):  # part of a model may switch it off
            return F.linear(x, layer.weight, layer.bias)
        if layer not in self.copies:
            dtype = torch.get_autocast_dtype(kind)
            self.copies[layer] = [p.detach().to(dtype) for p in layer.parameters(recurse=False)]
        return F.linear(x, *self.copies[layer])


# Up to as many rows, `linear_for_few_rows` is the faster one.
_FEW_ROWS = 64


def linear_for_few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear, x: (..., in) -> (..., out), as (W xᵀ)ᵀ where that pays.

    A decoding step multiplies each weight with a handful of rows. Laid out as x Wᵀ, a CPU's BLAS first repacks the
    weight, which takes as long as the product: the other way round takes about half of the time.
    """
    if x.numel() > _FEW_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    out = (weight @ x.reshape(-1, x.shape[-1]).T).T.contiguous().view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out.add_(bias)


@contextmanager
def quick_linears(model: nn.Module, device: torch.device) -> Iterator[None]:
    """On a CPU, the linear layers of `model` compute with `linear_for_few_rows` while this lasts."""
    if device.type != "cpu":
        yield
        return
    with computed_by(lambda layer, x: linear_for_few_rows(x, layer.weight, layer.bias), free_linears(model)):
        yield
