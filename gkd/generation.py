"""Completions for training: the student's own (on-policy) or the teacher's (`seq_kd`)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from transformers import GenerationConfig

from gkd.heads import base_of
from gkd.trl_compat import unwrap_model_for_generation


@contextmanager
def generation_mode(model: nn.Module, accelerator: Accelerator) -> Iterator[nn.Module]:
    """Unwraps `model` and makes it ready to generate: evaluation mode, ZeRO-3 parameters gathered.

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
        else:
            yield unwrapped
    finally:
        for module, training in modes:
            module.training = training
        for module, enabled in checkpointing:
            module.gradient_checkpointing = enabled


@contextmanager
def sampling_noise(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the global generators for the time of a generation, and restores them: training noise is untouched."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def generate_completions(
    model: nn.Module,
    prompts: torch.Tensor,
    prompt_mask: torch.Tensor,
    config: GenerationConfig,
    batch_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples one completion for each prompt.

    Args:
        model: an unwrapped model, in evaluation mode.
        prompts, prompt_mask: left-padded ids and their mask, int64 (B, P).
        config: what to sample; names the stop tokens (a list) and the pad token.
        batch_size: prompts that generate together; all by default.

    Returns:
        Completions (B, T), right-padded with the pad token, and their mask (B, T), int64. The stop token that ended a
        completion belongs to it.
    """
    width = prompts.shape[1]
    stops = torch.tensor(config.eos_token_id or [], device=prompts.device)
    parts = []
    base = base_of(model)
    own_config = base.generation_config
    # transformers fills what a passed config leaves open from the model's own (a repetition penalty, say), which would
    # sample from another distribution than the one being trained.
    base.generation_config = config
    try:
        for start in range(0, len(prompts), batch_size or len(prompts)):
            rows = slice(start, start + (batch_size or len(prompts)))
            ids = model.generate(prompts[rows], attention_mask=prompt_mask[rows], generation_config=config)[:, width:]
            stopped = torch.isin(ids, stops).long()
            parts.append((ids, (stopped.cumsum(1) - stopped == 0).long()))  # (b, t): up to the first stop token
    finally:
        base.generation_config = own_config
    length = max(ids.shape[1] for ids, _ in parts)
    completions = torch.cat([F.pad(ids, (0, length - ids.shape[1]), value=config.pad_token_id) for ids, _ in parts])
    masks = torch.cat([F.pad(mask, (0, length - mask.shape[1])) for _, mask in parts])
    return torch.where(masks.bool(), completions, config.pad_token_id), masks


def stack_prompts(batches: list[dict[str, torch.Tensor]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The left-padded `prompts` (b, P) of several micro-batches as one batch (B, P) with its mask."""
    width = max(batch["prompts"].shape[1] for batch in batches)

    def stack(name: str, value: int) -> torch.Tensor:
        return torch.cat([F.pad(b[name], (width - b[name].shape[1], 0), value=value) for b in batches])

    return stack("prompts", pad), stack("prompt_attention_mask", 0)


def training_batch(
    prompts: torch.Tensor,
    prompt_mask: torch.Tensor,
    completions: torch.Tensor,
    completion_mask: torch.Tensor,
    pad: int,
) -> dict[str, torch.Tensor]:
    """Joins left-padded prompts (B, P) and completions (B, T) to right-padded training rows, padding trimmed.

    Returns:
        `input_ids`, `attention_mask` and `labels` (B, L); labels are -100 outside the completion. With all padding on
        the right a token's position is its index, for models with learned positions too.
    """
    ids = torch.cat([prompts, completions], dim=1)
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    scored = torch.cat([torch.zeros_like(prompt_mask), completion_mask], dim=1)
    left = prompts.shape[1] - prompt_mask.sum(1, keepdim=True)  # (B, 1) pad tokens before each prompt
    order = (torch.arange(ids.shape[1], device=ids.device)[None] + left) % ids.shape[1]  # (B, P + T) rotate them away
    ids, mask, scored = (tensor.gather(1, order) for tensor in (ids, mask, scored))
    length = int(mask.sum(1).max())
    ids, mask, scored = ids[:, :length], mask[:, :length], scored[:, :length]
    return {
        "input_ids": torch.where(mask.bool(), ids, pad),
        "attention_mask": mask,
        "labels": torch.where(scored.bool(), ids, -100),
    }
