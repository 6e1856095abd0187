"""A model made ready to generate, and put back."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from gkd.compat import unwrap_model_for_generation
from gkd.models.lora import merged_lora


@contextmanager
def generation_mode(model: nn.Module, accelerator: Accelerator) -> Iterator[nn.Module]:
    """Unwraps `model` and makes it ready to generate: evaluation mode, LoRA merged, ZeRO-3 parameters gathered.

    In evaluation mode dropout is off and transformers' gradient checkpointing is inert, so the KV cache works; each
    module's own mode is put back afterwards, also when generation raises.
    """
    unwrapped = accelerator.unwrap_model(model)
    modes = [(module, module.training) for module in unwrapped.modules()]
    checkpointing = [
        (m, m.gradient_checkpointing) for m in unwrapped.modules() if hasattr(m, "gradient_checkpointing")
    ]
    try:
        unwrapped.eval()
        if accelerator.deepspeed_plugin is not None and accelerator.deepspeed_plugin.zero_stage == 3:
            with unwrap_model_for_generation(model, accelerator) as gathered:
                yield gathered
        elif (
            accelerator.distributed_type is DistributedType.FSDP
        ):  # sharded weights: each module gathers its own when called
            yield unwrapped
        else:
            with merged_lora(unwrapped):
                yield unwrapped
    finally:
        for module, training in modes:
            module.training = training
        for module, enabled in checkpointing:
            module.gradient_checkpointing = enabled
