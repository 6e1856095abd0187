"""LoRA adapters merged into their weights for the time of a generation, and taken out again without a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def base_parameters(model: PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the model below the adapter, by the names that they have without it."""
    for name, parameter in model.get_base_model().named_parameters():
        if model.base_model.prefix not in name and ".modules_to_save." not in name:
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter


def _mergeable(model: nn.Module) -> list[nn.Module]:
    """The adapted layers, or none of them if one can't be merged: quantized, or its weight is used elsewhere too."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not m.merged and not m.disable_adapters]
    bases = [layer.get_base_layer() for layer in layers]
    weights = [getattr(base, "weight", None) for base in bases]
    # Quantized weights may be stored as floats; what they have in common is a class of their own.
    if any(type(weight) is not nn.Parameter or not weight.is_floating_point() for weight in weights):
        return []
    owners: dict[int, int] = {}
    for module in model.modules():  # a head tied to the embedding: merging would change both
        weight = module._parameters.get("weight")
        if weight is not None:
            owners[weight.data_ptr()] = owners.get(weight.data_ptr(), 0) + 1
    return [] if any(owners.get(weight.data_ptr(), 0) > 1 for weight in weights) else layers


@contextmanager
@torch.no_grad()
def merged_lora(model: nn.Module) -> Iterator[bool]:
    """Merges the adapters; yields whether it did. Afterwards every weight has the bits that it had before.

    Subtracting what was added would not restore them, so each weight is copied aside: the context holds as many bytes
    as the adapted weights. Where memory is too short for that, or a layer can't be merged (4-bit weights, a head tied to
    the embedding), the adapters stay as they are, which computes the same more slowly.
    """
    kept: list[tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]] = []

    def restore():
        while kept:
            layer, copies = kept.pop()
            if layer.merged:
                layer.unmerge()
            for parameter, copy in copies:
                parameter.data.copy_(copy)

    merged = True
    layers = _mergeable(model)
    try:
        for layer in layers:
            kept.append((layer, [(p, p.detach().clone()) for p in layer.get_base_layer().parameters()]))
            layer.merge()
    except (torch.OutOfMemoryError, NotImplementedError, ValueError):
        restore()
        merged = False
    try:
        yield merged and bool(layers)
    finally:
        restore()
