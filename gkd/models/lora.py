"""LoRA: adds an adapter, and merges it for a generation and exactly undoes that."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from trl import get_peft_config

from gkd.config.training import GKDArguments, StudentArguments


def base_parameters(model: PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The base model's parameters, by their names without the adapter."""
    for name, parameter in model.get_base_model().named_parameters():
        if model.base_model.prefix not in name and ".modules_to_save." not in name:
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter


def _mergeable(model: nn.Module) -> list[nn.Module]:
    """The adapted layers; an empty list if one can't be merged: it is quantized, or shares its weight."""
    layers, uses = [], Counter()
    for module in model.modules():  # once: this takes longer than merging
        if isinstance(module, BaseTunerLayer) and not module.merged and not module.disable_adapters:
            layers.append(module)
        elif (weight := module._parameters.get("weight")) is not None:
            uses[weight.data_ptr()] += 1
    weights = [getattr(layer.get_base_layer(), "weight", None) for layer in layers]
    # Quantized weights may be stored as floats, but are never plain nn.Parameters.
    if any(type(weight) is not nn.Parameter or not weight.is_floating_point() for weight in weights):
        return []
    # Merging into a head tied to the embedding would change both.
    return [] if any(uses[weight.data_ptr()] > 1 for weight in weights) else layers


def _merge(layer: BaseTunerLayer) -> None:
    """`layer.merge()`, whose checks take ten times as long as what it computes; plain LoRA computes the same here."""
    plain = type(layer) is LoraLinear and not (
        layer.lora_variant or layer.fan_in_fan_out or any(layer.lora_bias.values())
    )
    if not plain:
        _merge_by_peft(layer)
        return
    pairs = {
        name: (layer.lora_B[name].weight, layer.lora_A[name].weight)
        for name in layer.active_adapters
        if name in layer.lora_A
    }
    if any(b.device.type == "cpu" and b.dtype.itemsize < 4 for b, _ in pairs.values()):  # which peft widens
        _merge_by_peft(layer)
        return
    weight = layer.get_base_layer().weight
    for name, (b, a) in pairs.items():
        weight.data += (b @ a) * layer.scaling[name]
        layer.merged_adapters.append(name)


def _merge_by_peft(layer: BaseTunerLayer) -> None:
    """`layer.merge()` in place: what peft computes elsewhere, as for DoRA, CUDA graphs would not find."""
    parameters = [*layer.get_base_layer().parameters()]
    places = [parameter.data for parameter in parameters]
    layer.merge()
    for parameter, place in zip(parameters, places, strict=True):
        if parameter.data_ptr() != place.data_ptr():
            parameter.data = place.copy_(parameter.data)


@contextmanager
@torch.no_grad()
def merged_lora(model: nn.Module) -> Iterator[bool]:
    """Merges the adapters; yields whether it could. On exit every weight has its former bits.

    Subtraction would not restore the bits, so each adapted weight is copied, which doubles its memory. If memory is
    short, or a layer can't be merged (4-bit weights, a head tied to the embedding), the adapters stay unmerged, which
    computes the same more slowly.
    """

    layers = _mergeable(model)
    weights = [parameter for layer in layers for parameter in layer.get_base_layer().parameters()]

    def restore(copies: list[torch.Tensor]) -> None:
        for layer in layers:
            layer.merged_adapters.clear()  # as unmerging does, which would subtract first
        torch._foreach_copy_([weight.data for weight in weights], copies)

    with ExitStack() as restoring:
        try:
            if layers:
                copies = [torch.empty_like(weight) for weight in weights]
                torch._foreach_copy_(copies, weights)
                restoring.callback(restore, copies)
                del copies
            for layer in layers:
                _merge(layer)
        except (RuntimeError, ValueError):  # short memory; or peft can't, such as a bias into a layer without one
            restoring.close()
            layers = []
        yield bool(layers)


def lora_config(student_args: StudentArguments) -> LoraConfig | None:
    """TRL's LoRA configuration, on all linear layers but the head unless --lora_target_modules says otherwise."""
    if (config := get_peft_config(student_args)) is not None:
        if config.target_modules is None and config.target_parameters is None:
            config.target_modules = "all-linear"
        if student_args.model_revision != "main":
            config.revision = student_args.model_revision  # written to adapter_config.json
    return config


def add_lora(model: nn.Module, config: PeftConfig, args: GKDArguments) -> PeftModel:
    """Wraps the student with a new adapter, as TRL's SFTTrainer does.

    Under ZeRO-3 the adapter gets the dtype of the base weights: gathering fails with parameters of two dtypes.
    """
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    keep_dtype = zero3 and not getattr(model, "is_quantized", False)
    return get_peft_model(model, config, autocast_adapter_dtype=not keep_dtype)
