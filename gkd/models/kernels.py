"""Liger's Triton kernels in a model's layers while it trains or is asked: norms, rotary embeddings and gated activations.

Each is one kernel where PyTorch launches five to ten that read and write the same states again. They are in place inside a
context alone: decoding has kernels of its own, and a model that the user gets back is as it was.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
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
                plain, patches = _states(model, ids), _recorded(base_of(model))
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
