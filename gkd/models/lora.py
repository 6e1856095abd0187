"""LoRA: adding an adapter, merging it for the time of a generation, and taking it out again without a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from trl import get_peft_config

from gkd.config.training import GKDArguments, StudentArguments


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


def lora_config(student_args: StudentArguments) -> LoraConfig | None:
    """TRL's LoRA configuration, on all linear layers but the head unless --lora_target_modules says otherwise."""
    config = get_peft_config(student_args)
    if config is not None and config.target_modules is None and config.target_parameters is None:
        config.target_modules = "all-linear"
    if config is not None and student_args.model_revision != "main":
        config.revision = student_args.model_revision  # kept in adapter_config.json
    return config


def add_lora(model: nn.Module, config: PeftConfig, args: GKDArguments) -> PeftModel:
    """Wraps the student with a fresh adapter, as TRL's SFTTrainer does.

    Under ZeRO-3 the adapter keeps the dtype of the base weights, since parameters of two dtypes break its gathering.
    """
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    keep_dtype = zero3 and not getattr(model, "is_quantized", False)
    return get_peft_model(model, config, autocast_adapter_dtype=not keep_dtype)
