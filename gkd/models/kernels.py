"""Fewer kernels in a model's layers while it trains or is asked.

Liger's Triton kernels for norms, rotary embeddings and gated activations are one each where PyTorch launches five to ten
that read and write the same states again; and LoRA's products add to their result themselves. They are in place inside a
context alone: decoding has kernels of its own, and a model that the user gets back is as it was.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from gkd.io.errors import first_line
from gkd.models.heads import base_of, last_hidden_states, modes_kept, probe_ids

logger = get_logger(__name__)
_ABSENT = object()  # the value of an attribute that is not set

try:
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance as apply_liger
except ImportError:  # not on Linux, or no Triton
    apply_liger = None


class LayerKernels:
    """The kernels of one model; none without a GPU, beside torch.compile, or where hidden states would differ.

    Called under the autocast in which the model will run.

    Args:
        who: whose layers they are, for the log.
        whole: the weights are not sharded, so that a forward can be tried.
    """

    _in_place: ClassVar["LayerKernels | None"] = None  # those of the innermost context

    def __init__(self, model: nn.Module, who: str, whole: bool = True):
        self._patches: list[tuple[dict[str, Any], dict[str, Any]]] = []  # of modules' attributes: where, and what
        ids = probe_ids(model)
        compiled = any(getattr(module, "_compiled_call_impl", None) for module in model.modules())  # fused already
        if apply_liger is None or ids.device.type != "cuda" or compiled or not whole:
            return
        try:
            with self.applied():  # none yet, nor another model's
                plain, patches = _states(model, ids), _recorded(base_of(model)) + _lora_patches(model)
            self._patches = patches
            with self.applied():
                off = float((_states(model, ids) - plain).norm() / plain.norm())
            problem = None if off < 0.1 else f"hidden states differ by {off:.1%}"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any: whatever a library of kernels does, the plain layers do
            problem = first_line(error)
        if problem is not None:
            logger.info(f"The {who} keeps its own layers: {problem}")
            self._patches = []

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Forward and backward run inside this context. The kernels of a context around it are out of place meanwhile.

        Models of one architecture share its Python module: the teacher, perhaps on a CPU, is asked while the student's
        kernels are in place.
        """
        outer = LayerKernels._in_place
        _exchange(outer, self)
        LayerKernels._in_place = self
        try:
            yield
        finally:
            LayerKernels._in_place = outer
            _exchange(self, outer)


class _LoraProduct(torch.autograd.Function):
    """x Wᵀ + b + s (x' Aᵀ) Bᵀ of x (n, in) and x' (n, in), which is x if it is None; W (out, in) and b are frozen.

    Autograd would scale a result of (n, out) and add it to another, and add two gradients of (n, in).
    """

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, a, b, scaling):
        low = (x if dropped is None else dropped) @ a.T  # (n, r)
        ctx.save_for_backward(x if dropped is None else dropped, low, weight, a, b)
        ctx.scaling, ctx.drops = scaling, dropped is not None
        return F.linear(x, weight, bias).addmm_(low, b.T, alpha=scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        read, low, weight, a, b = ctx.saved_tensors
        low_grad = grad @ b  # (n, r), without the scaling
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_read = None
        if ctx.drops:
            grad_read = low_grad @ a * ctx.scaling
        elif grad_x is not None:
            grad_x.addmm_(low_grad, a, alpha=ctx.scaling)
        grad_a, grad_b = low_grad.T @ read, grad.T @ low
        return grad_x, grad_read, None, None, grad_a * ctx.scaling, grad_b * ctx.scaling, None


def _lora_patches(model: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """A forward for each linear layer with one plain adapter on frozen weights."""
    patches = []
    for layer in (m for m in model.modules() if type(m) is LoraLinear):
        base, names = layer.get_base_layer(), [name for name in layer.active_adapters if name in layer.lora_A]
        plain = type(base) is nn.Linear and not (
            base._forward_hooks or base._forward_pre_hooks or base.weight.requires_grad
        )
        plain = plain and len(names) == 1 and not (layer.lora_variant or any(layer.lora_bias.values()))
        if plain and not (base.bias is not None and base.bias.requires_grad):
            patches.append((vars(layer), {"forward": _lora_forward(layer, base, names[0])}))
    return patches


def _lora_forward(layer: LoraLinear, base: nn.Linear, name: str) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if args or kwargs or layer.disable_adapters or layer.merged or layer.active_adapters != [name]:
            return LoraLinear.forward(layer, x, *args, **kwargs)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.weight.dtype
        x, dropout = x.to(dtype), layer.lora_dropout[name]
        dropped = dropout(x) if layer.training and not isinstance(dropout, nn.Identity) else None
        rows = [part if part is None else part.flatten(0, -2) for part in (x, dropped)]
        weights = (base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight)
        weights = [part if part is None else part.to(dtype) for part in weights]
        return _LoraProduct.apply(*rows, *weights, layer.scaling[name]).unflatten(0, x.shape[:-1])

    return forward


def _exchange(leaving: LayerKernels | None, coming: LayerKernels | None) -> None:
    """Takes kernels out of place and puts others there; each keeps what is out of place meanwhile."""
    for place, values in (patch for kernels in (leaving, coming) if kernels for patch in kernels._patches):
        for name, value in values.items():
            values[name] = place.get(name, _ABSENT)
            if value is _ABSENT:
                del place[name]
            else:
                place[name] = value


def _recorded(base: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What Liger sets, in the modules of a model and in the Python modules of its architecture, after undoing it."""
    homes = [
        home for name, home in sys.modules.items() if name.startswith("transformers.models.") and home is not None
    ]
    places = [vars(owner) for owner in (*base.modules(), *homes)]
    before = [dict(place) for place in places]
    try:
        apply_liger(base, cross_entropy=False, fused_linear_cross_entropy=False)
        changes = [
            {name: value for name, value in place.items() if name not in old or old[name] is not value}
            for place, old in zip(places, before, strict=True)
        ]
    finally:
        for place, old in zip(places, before, strict=True):
            for name in place.keys() - old.keys():
                del place[name]
            place.update(old)
    return [(place, values) for place, values in zip(places, changes, strict=True) if values]


@torch.no_grad()
def _states(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with modes_kept(model):
        model.eval()
        return last_hidden_states(model, ids, None).float()
