"""Decoding with a static KV cache: a step, one token for all rows, is a CUDA graph that is captured once and replayed.

An eager step of a 1B model launches about 700 small kernels, and the GPU waits for the CPU most of the time; a replay
launches them all at once. Capturing takes an eager step or two (a second, against a minute of compiling), so new shapes
are cheap; lengths are still rounded up to keep them few.

A step computes the same as the model's forward: it calls the model's modules with our cache (`_StaticLayer`) and our
attention function for a single query token. Prompts are read by the model's unchanged forward.
"""

import inspect
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import Cache, StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gkd.generation.linears import CastWeights, free_linears
from gkd.io.replaced import replaced
from gkd.models.heads import LogitHead, base_of

# The CPU checks only every so many steps whether all rows have finished, since that waits for the GPU.
_STEPS_BETWEEN_CHECKS = 16
# Up to this share of the device's memory, the cache and its graphs are kept between generations.
KEPT_SHARE = 0.02
# Up to this share, copies of fp32 weights in autocast's dtype are kept too; larger models are cast at each token.
CAST_SHARE = 0.05
_ATTENTION = "gkd_single_token"


class Unsupported(Exception):
    """This model or configuration can't be decoded statically; the message says why."""


def on_device(device: torch.device) -> torch.cuda.device:
    """Makes a GPU the current one for new streams and graphs; has no effect for other devices."""
    return torch.cuda.device(device.index if device.type == "cuda" else -1)


def length_bucket(length: int) -> int:
    """Rounds up to one of four lengths per power of two, so that at most a fifth of the cache is unused."""
    step = max(64, 2 ** (length.bit_length() - 3))
    return -(-length // step) * step


def batch_bucket(rows: int) -> int:
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8


def check_supported(model: nn.Module, config: GenerationConfig) -> None:
    """Raises Unsupported for models and settings that can't work; others may fail while the graph is captured."""
    base = base_of(model)
    text = base.config.get_text_config()
    name = type(base).__name__
    if not getattr(base, "_can_compile_fullgraph", False):
        raise Unsupported(f"{name} has no static-cache support in transformers")
    other = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if other:
        raise Unsupported(f"{name} has layers of other kinds: {', '.join(sorted(other))}")
    if "dynamic" in str(getattr(text, "rope_parameters", None)):
        raise Unsupported(f"{name} recomputes its rotary frequencies as a text grows")
    if config.top_k not in (0, None) or config.top_p not in (1.0, None) or config.num_beams not in (1, None):
        raise Unsupported("top-k, top-p and beams are not sampled statically")


def _single_token_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, softcap=None, s_aux=None, **kwargs
):
    """Attention of one query token: query (B, Hq, 1, D), key and value (B, Hkv, L, D), additive mask (B, 1, 1, L).

    The Hq / Hkv query heads that share a key head take the place of query positions, so keys are not repeated.
    """
    if s_aux is not None:
        raise Unsupported("attention sinks")
    batch, heads, _, width = query.shape
    query = query.reshape(batch, key.shape[1], heads // key.shape[1], width)  # (B, Hkv, G, D)
    if softcap is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    else:
        scores = query @ key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)  # (B, Hkv, G, L)
        scores = torch.tanh(scores / softcap) * softcap + attention_mask
        out = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
    return out.reshape(batch, heads, 1, value.shape[-1]).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _single_token_attention)


def _our_attention(model: nn.Module) -> AbstractContextManager:
    return replaced(base_of(model).config.get_text_config(), "_attn_implementation", _ATTENTION)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def device_memory(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")


class _StaticLayer(StaticLayer):
    """Keys and values of one layer, (B, H, L, D). New ones go to position `slot`, a tensor (1,) that replays read."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor):
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.slot = keys, values, slot
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys.index_copy_(2, self.slot, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.slot, value_states.to(self.values.dtype))
        return self.keys, self.values


def cache_argument(body: nn.Module) -> str:
    """The name of the cache in a model's forward: transformers 5.24 renamed `past_key_values`."""
    return "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"


def _forward(model: nn.Module, ids, mask, positions, cache: Cache) -> torch.Tensor:
    """(B, q) ids -> (B, V) logits after the last of them, in fp32."""
    body = base_of(model).base_model
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, cache_argument(body): cache}
    hidden = body(**inputs, use_cache=True)[0]
    return LogitHead.of(model)(hidden[:, -1]).float()


def _choose(logits: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """(B, V) logits -> (B,) tokens. Samples by argmax(logits / T + Gumbel noise), without a sync with the CPU."""
    if config.suppress_tokens:
        first = config.suppress_tokens[0]  # padding ids, the last of the vocabulary
        logits[:, first : first + len(config.suppress_tokens)] = -torch.inf
    if not config.do_sample:
        return logits.argmax(-1)
    noise = torch.empty_like(logits).exponential_().log_()
    return (logits / config.temperature).sub_(noise).argmax(-1)


class _Decoder:
    """State and graph of decoding `rows` texts of up to `length` tokens, prompt included."""

    def __init__(self, model: nn.Module, config: GenerationConfig, layers: list, rows: int, length: int, device):
        self.model, self.config, self.graph = model, config, None
        zeros = partial(torch.zeros, dtype=torch.long, device=device)
        self.slot, self.step = zeros(1), zeros(1)
        self.cache = Cache(layers=[_StaticLayer(keys, values, self.slot) for keys, values in layers])
        self.valid = torch.ones(rows, length, dtype=torch.bool, device=device)
        self.columns = torch.arange(length, device=device)
        self.token, self.position = zeros(rows, 1), zeros(rows, 1)
        self.finished = zeros(rows, dtype=torch.bool)
        self.out = zeros(rows, config.max_new_tokens)
        self.stops = torch.tensor(config.eos_token_id or [], dtype=torch.long, device=device)
        self.zero = zeros((), dtype=layers[0][0].dtype)
        text = base_of(model).config.get_text_config()
        self.kinds = set(getattr(text, "layer_types", None) or [])
        slides = getattr(text, "use_sliding_window", True) and ("sliding_attention" in self.kinds or not self.kinds)
        self.window = getattr(text, "sliding_window", None) if slides else None

    def _masks(self) -> torch.Tensor | dict[str, torch.Tensor]:
        """Additive masks (B, 1, 1, L) of the token at `slot`."""
        seen = self.valid & (self.columns <= self.slot)
        full = torch.where(seen, self.zero, -torch.inf)[:, None, None]
        if self.window is None:
            return full
        near = torch.where(seen & (self.columns > self.slot - self.window), self.zero, -torch.inf)[:, None, None]
        return {"full_attention": full, "sliding_attention": near} if self.kinds else near

    def _advance(self) -> None:
        """Decodes one token for each row; changes all state in place."""
        logits = _forward(self.model, self.token, self._masks(), self.position, self.cache)
        self._accept(_choose(logits, self.config))
        self.position += 1
        self.slot += 1

    def _accept(self, token: torch.Tensor) -> None:
        token = torch.where(self.finished, self.config.pad_token_id, token)
        self.out.index_copy_(1, self.step, token[:, None])
        self.finished |= (token[:, None] == self.stops).any(1)
        self.token.copy_(token[:, None])
        self.step += 1

    def capture(self, pool) -> None:
        """Records `_advance` as a CUDA graph. `load` overwrites the garbage that this leaves in the state."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Autocast frees its cached casts on exit, while the graph still reads them: so no caching.
        autocast = torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False)
        with torch.random.fork_rng(devices=[self.slot.device]), autocast, _our_attention(self.model):
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._advance()
            torch.cuda.current_stream().wait_stream(stream)
            self.slot.zero_()
            self.step.zero_()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self._advance()
        self.graph = graph

    def load(self, prompt_cache: Cache, prompt_mask: torch.Tensor, first: torch.Tensor) -> None:
        """Starts with prompts (b, P) and their first new token (b,); rows beyond b count as finished."""
        rows, width = prompt_mask.shape
        for layer, prompt_layer in zip(self.cache.layers, prompt_cache.layers, strict=True):
            layer.keys[:rows, :, :width].copy_(prompt_layer.keys)
            layer.values[:rows, :, :width].copy_(prompt_layer.values)
            layer.keys[:, :, width:].zero_()  # a masked NaN times 0 would still be NaN
            layer.values[:, :, width:].zero_()
        self.valid.fill_(True)
        self.valid[:rows, :width] = prompt_mask.bool()
        self.position.zero_()
        self.position[:rows] = prompt_mask.sum(1, keepdim=True)
        self.slot.fill_(width)
        self.step.zero_()
        self.finished.fill_(True)
        self.finished[:rows] = False
        self.out.fill_(self.config.pad_token_id)
        self._accept(F.pad(first, (0, len(self.finished) - rows)))

    def run(self) -> None:
        """Generates the tokens after the first, until all rows have finished or have `max_new_tokens`."""
        advance = self._advance if self.graph is None else self.graph.replay
        with _our_attention(self.model):
            for step in range(1, self.config.max_new_tokens):
                if step % _STEPS_BETWEEN_CHECKS == 1 and self.finished.all():
                    return
                advance()


@dataclass(eq=False)
class StaticDecoding:
    """All decoders of one model. They share the memory of their caches, which grows to the largest shape."""

    seconds: float = 0.0  # spent on capturing graphs
    captures: int = 0
    decoders: dict[tuple, _Decoder] = field(default_factory=dict)  # by shape and sampling, as long as no weight moves
    casts: dict[torch.dtype, CastWeights] = field(default_factory=dict)  # of fp32 weights, by autocast's dtype
    _storage: torch.Tensor | None = None
    _addresses: int | None = None
    _pool: Any = None

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, prompts: torch.Tensor, prompt_mask: torch.Tensor, config: GenerationConfig
    ) -> torch.Tensor:
        """Completions (B, max_new_tokens) of left-padded prompts (B, P), with pad tokens after a stop token.

        Raises:
            Unsupported: see `check_supported`.
            RuntimeError: a graph can't capture the model, or memory is short.
        """
        check_supported(model, config)
        prompt_cache = DynamicCache()
        positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
        addresses = hash(tuple(p.data_ptr() for p in model.parameters()))
        if addresses != self._addresses:  # graphs read weights at fixed ones
            self.release()
            self._addresses = addresses
        with self.cast_weights(model, prompts.device):
            first = _choose(_forward(model, prompts, prompt_mask, positions, prompt_cache), config)
            decoder = self._decoder_for(model, prompt_cache, prompts, config)
            decoder.load(prompt_cache, prompt_mask, first)
            del prompt_cache
            decoder.run()
        completions = decoder.out[: len(prompts)].clone()
        if self._storage.nbytes > KEPT_SHARE * device_memory(prompts.device):
            del decoder
            self.release()
        return completions

    def release(self) -> None:
        """Frees graphs, caches and cast weights."""
        self._drop_decoders()
        self.casts.clear()

    def _drop_decoders(self) -> None:
        self.decoders.clear()
        self._storage = self._pool = None

    def cast_weights(self, model: nn.Module, device: torch.device) -> AbstractContextManager:
        """Inside the context, under autocast, linear layers use copies of fp32 weights, if these fit in memory."""
        dtype = _autocast_dtype(device)
        layers = [layer for layer in free_linears(model) if layer.weight.dtype is torch.float32]
        weights = sum(layer.weight.numel() for layer in layers)
        if dtype is None or weights * dtype.itemsize > CAST_SHARE * device_memory(device):
            return nullcontext()
        return self.casts.setdefault(dtype, CastWeights()).used_by(layers)

    def _decoder_for(self, model, prompt_cache: Cache, prompts: torch.Tensor, config: GenerationConfig) -> _Decoder:
        rows = batch_bucket(len(prompts))
        length = length_bucket(prompts.shape[1] + config.max_new_tokens)
        device = prompts.device
        casting = _autocast_dtype(device)
        # Graphs differ for an adapter that is active, merged or disabled.
        kinds = "merged", "disable_adapters"
        adapters = [any(getattr(m, kind, False) is True for m in model.modules()) for kind in kinds]
        sampling = config.max_new_tokens, config.do_sample, config.temperature, config.pad_token_id
        ids = tuple(config.eos_token_id or []), len(config.suppress_tokens or [])
        key = (rows, length, *adapters, casting, *sampling, *ids)
        tensors = [tensor for layer in prompt_cache.layers for tensor in (layer.keys, layer.values)]
        shapes = [(rows, tensor.shape[1], length, tensor.shape[3]) for tensor in tensors]
        sizes = [math.prod(shape) for shape in shapes]
        # Under autocast, rotary embeddings turn bf16 keys into fp32 ones, which attention casts back.
        dtype = casting or tensors[0].dtype
        needed = sum(sizes) * dtype.itemsize
        if self._storage is None or self._storage.nbytes < needed:
            self._drop_decoders()
            self._storage = torch.zeros(needed, dtype=torch.uint8, device=device)
        if key in self.decoders:
            return self.decoders[key]
        parts = self._storage[:needed].view(dtype).split(sizes)
        views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        layers = list(zip(views[::2], views[1::2], strict=True))
        decoder = _Decoder(model, config, layers, rows, length, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
            started = time.perf_counter()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            decoder.capture(self._pool)
            torch.cuda.synchronize()
            self.seconds += time.perf_counter() - started
            self.captures += 1
        self.decoders[key] = decoder
        return decoder
