"""Sampling of text: its configuration, its noise and seeds, and a fingerprint of model and configuration."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig

from gkd.generation.kernels import log_sums
from gkd.models.lora import base_parameters
from gkd.models.pairing import Pairing


def sampling_config(
    pairing: Pairing, size: int, max_new_tokens: int, temperature: float, shared: int | None = None
) -> GenerationConfig:
    """How a model with logits for `size` ids samples: from the whole distribution; greedy at temperature 0.

    Ids from `shared` on, by default the pairing's `vocab_size`, are padding that the other model lacks. They are never
    sampled, and not part of the divergence either. Only evaluations may have a temperature of 0.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=pairing.tokenizer.pad_token_id,
        eos_token_id=pairing.stop_ids or None,
        suppress_tokens=list(range(shared or pairing.vocab_size, size)) or None,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )


@contextmanager
def sampling_noise(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's global generators, and restores them on exit, so that training noise is unaffected."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":  # only this GPU's generator: the student may be on another GPU
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[index].manual_seed(seed)
        elif device.type != "cpu":
            torch.manual_seed(seed)
        yield


def random_states(device: torch.device) -> list[torch.Tensor]:
    """The states of the CPU's generator, and of the GPU's if `device` is one."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


# Another number for each way in which a seed draws text, so that a run that resumes across versions says so.
SAMPLING_VERSION = 2
# Tokens of a block of the vocabulary, see `draw`.
_BLOCK = 256


class NotFinite(Exception):
    """The logits are not finite, so no token can be drawn."""


def uniform_noise(seed: int, rows: int, tokens: int) -> torch.Tensor:
    """Uniform numbers of [0, 1), float64 (rows, tokens), on the CPU: one decides a token.

    Each depends on (seed, row, token) alone, so a row's text does not depend on the rows beside it.
    """
    noise = np.empty((rows, tokens))
    for row in range(rows):
        np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, row, 0])).random(out=noise[row])
    return torch.from_numpy(noise)


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws from softmax(logits / temperature) by inverting the distribution function, without a sync with the CPU.

    First a block of the vocabulary, then a token in it: a running sum over the vocabulary is slow, and a long one rounds.

    Args:
        logits: (B, V), of any float dtype.
        uniform: (B,) of [0, 1), float64.

    Returns:
        Tokens (B,), and whether the row's logits were finite, (B,).
    """
    vocab_size = logits.shape[-1]
    size = math.gcd(vocab_size, _BLOCK)
    if size < _BLOCK // 8:
        logits, size = F.pad(logits, (0, -vocab_size % _BLOCK), value=-torch.inf), _BLOCK
    blocks = logits.unflatten(-1, (-1, size))  # (B, n, size)
    block, rest = _invert(log_sums(blocks, temperature), uniform)
    inside = blocks.take_along_dim(block[:, None, None], 1)[:, 0]  # (B, size)
    token, rest = _invert(inside.float() / temperature, rest)
    return (block * size + token).clamp(max=vocab_size - 1), rest.isfinite()  # of NaN


def _invert(logits: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws from softmax(logits), (B, n), by `uniform` (B,); returns the choice, and where in its share `uniform` is."""
    shares = torch.softmax(logits, -1, dtype=torch.float64)
    if torch.are_deterministic_algorithms_enabled():  # on a GPU a cumsum is none
        sums = shares @ torch.ones(2 * shares.shape[-1:], dtype=shares.dtype, device=shares.device).triu()
    else:
        sums = shares.cumsum(-1)
    point = uniform[:, None] * sums[:, -1:] * (1 - 2**-50)  # rounded, it stays below the last sum
    choice = torch.searchsorted(sums, point, right=True)  # the first sum above: never a share of 0
    choice = choice.clamp(max=logits.shape[-1] - 1)
    share = shares.gather(1, choice)
    rest = 1 - (sums.gather(1, choice) - point) / share
    return choice[:, 0], rest[:, 0].clamp(0, 1 - 2**-50)


# Numbers of independent random streams from one seed.
SOURCE_STREAM, SAMPLING_STREAM, EVAL_STREAM = 1, 2, 3
_SAMPLED_WEIGHTS = 64  # of each parameter, for a fingerprint


def sampling_seed(seed: int, step: int, rank: int, evaluation: bool = False) -> int:
    """The seed of the noise of one generation, different for each step and rank."""
    stream = EVAL_STREAM if evaluation else SAMPLING_STREAM
    return int(np.random.SeedSequence([seed, stream, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def writer_fingerprint(model: nn.Module, config: GenerationConfig, without_adapter: bool = False) -> bytes:
    """A hash of a sample of each weight and of the sampling settings; the model's name or folder is no part of it."""
    return sampling_fingerprint(weights_digest(model, without_adapter), config)


@torch.no_grad()
def weights_digest(model: nn.Module, without_adapter: bool = False) -> "hashlib._Hash":
    """A hash of a sample of each weight; `without_adapter`, that of a PeftModel's base as if it had no adapter."""
    digest = hashlib.sha256()
    samples = []
    for name, parameter in base_parameters(model) if without_adapter else model.named_parameters():
        flat = parameter.detach().flatten()
        samples.append(flat[:: max(1, flat.numel() // _SAMPLED_WEIGHTS)][:_SAMPLED_WEIGHTS].float())
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
    device = samples[0].device  # layers may be on several
    digest.update(torch.cat([sample.to(device) for sample in samples]).cpu().numpy().tobytes())
    return digest


def sampling_fingerprint(weights: "hashlib._Hash", config: GenerationConfig) -> bytes:
    """`writer_fingerprint` from the digest of the weights."""
    digest = weights.copy()
    names = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p")
    sampling = {name: getattr(config, name) for name in names}
    sampling |= {"stop": config.eos_token_id, "suppressed": len(config.suppress_tokens or [])}
    digest.update(json.dumps(sampling, sort_keys=True).encode())
    return digest.digest()
