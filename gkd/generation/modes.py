"""From prompts to completions: prepares a model, seeds the noise, generates, and restores the model."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import GenerationConfig

from gkd.compat import unwrap_model_for_generation
from gkd.generation.generator import Generator
from gkd.generation.sampling import sampling_noise
from gkd.io.replaced import replaced
from gkd.models.heads import modes_kept
from gkd.models.lora import merged_lora


@contextmanager
def generation_mode(model: nn.Module, accelerator: Accelerator) -> Iterator[nn.Module]:
    """Unwraps `model` and prepares it to generate: evaluation mode, LoRA merged, ZeRO-3 parameters gathered.

    Evaluation mode switches off dropout, and gradient checkpointing, which would disable the KV cache. The mode of each
    module is restored on exit, also after an exception.
    """
    unwrapped = accelerator.unwrap_model(model)
    with ExitStack() as stack:
        for module in unwrapped.modules():
            if hasattr(module, "gradient_checkpointing"):
                stack.enter_context(replaced(module, "gradient_checkpointing", module.gradient_checkpointing))
        stack.enter_context(modes_kept(unwrapped))
        unwrapped.eval()
        if accelerator.deepspeed_plugin is not None and accelerator.deepspeed_plugin.zero_stage == 3:
            yield stack.enter_context(unwrap_model_for_generation(model, accelerator))
            return
        if accelerator.distributed_type is not DistributedType.FSDP:  # whose modules gather their weights when called
            stack.enter_context(merged_lora(unwrapped))
        yield unwrapped


def complete(
    model: nn.Module,
    accelerator: Accelerator,
    generator: Generator,
    prompts: torch.Tensor,
    prompt_mask: torch.Tensor,
    config: GenerationConfig,
    seed: int,
    autocast: bool = False,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Completions of prompts, which depend only on the weights, the prompts, `config` and `seed`.

    Args:
        model: may be wrapped for training, in any mode.
        prompts, prompt_mask: left-padded ids and their mask, int64 (B, P).
        config: see `gkd.generation.sampling.sampling_config`.
        seed: of the sampling noise; torch's global generators are restored afterwards.
        autocast: generate under the accelerator's autocast, as the student trains.
        device: of the model; by default that of `prompts`.

    Returns:
        Completions (B, T) and their mask, on the device of `prompts`; see `gkd.generation.generator.Generator`.
    """
    device = device or prompts.device
    with (
        generation_mode(model, accelerator) as ready,
        sampling_noise(seed, device),
        accelerator.autocast() if autocast else nullcontext(),
    ):
        ids, mask = generator(ready, prompts.to(device), prompt_mask.to(device), config)
        return ids.to(prompts.device), mask.to(prompts.device)
