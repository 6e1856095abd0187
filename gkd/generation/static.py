"""Decoding with a static KV cache: a step, one token for all rows, is a CUDA graph that is captured once and replayed.

An eager step of a 1B model launches about 700 small kernels, and the GPU waits for the CPU most of the time; a replay
launches them all at once. Capturing takes an eager step or two (a second, against a minute of compiling), so new shapes
are cheap; lengths are still rounded up to keep them few.

Prompts are read by the model's unchanged forward, or, if they are few, by a graph too (`gkd.generation.prompts`). A `Decoder`
holds the state of some rows; here it is chosen which one decodes, what is captured, and what stays in memory.
"""

import logging
import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import DynamicCache, GenerationConfig

from gkd.generation.decoder import Decoder, Unsupported, difference, fewer_rows, next_logits
from gkd.generation.fused import FusedStep, unsupported
from gkd.generation.linears import CastWeights, free_linears
from gkd.generation.products import FEW_ROWS
from gkd.generation.prompts import padded, positions_of
from gkd.generation.sampling import NotFinite
from gkd.io.errors import first_line
from gkd.models.heads import base_of
from gkd.models.loading import is_spread

logger = logging.getLogger(__name__)

# Up to this share of the device's memory, the cache and its graphs are kept between generations; a larger cache is if
# the peak of a training step leaves room, up to the other share.
KEPT_SHARE, MOST_SHARE = 0.02, 0.9
# Up to this share, rows generate together.
CACHE_SHARE = 0.2
# Prompts are read by as many rows at a time as have this many tokens.
PROMPT_TOKENS = 2**15
# Up to this share, copies of fp32 weights in autocast's dtype are kept too; larger models are cast at each token.
CAST_SHARE = 0.05


def length_bucket(length: int) -> int:
    """Rounds up to one of four lengths per power of two, so that at most a fifth of the cache is unused."""
    step = max(64, 2 ** (length.bit_length() - 3))
    return -(-length // step) * step


def batch_bucket(rows: int) -> int:
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8


def rows_that_fit(model: nn.Module, length: int, device: torch.device) -> int:
    """How many rows of this length a generation may have: their cache takes at most `CACHE_SHARE` of a GPU's memory.

    By the size of the GPU, not by what is free: a resumed run generates as many together.
    """
    text = base_of(model).config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if device.type != "cuda" or heads is None:
        return sys.maxsize
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    size = (autocast_dtype(device) or model.dtype).itemsize * 2 * text.num_hidden_layers * kv_heads * width
    return rows_of_share(device_memory(device), size * length_bucket(length))


def rows_of_share(memory: float, size: int) -> int:
    """How many rows, with a cache of `size` bytes each, generate together in a GPU of this memory."""
    return max(1, int(CACHE_SHARE * memory / size))


def _state_of_adapters(model: nn.Module) -> tuple:
    """In what graphs differ: whether adapters are merged, whether they are disabled, and which are active."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    active = tuple(layers[0].active_adapters) if layers else ()
    return any(layer.merged for layer in layers), any(layer.disable_adapters for layer in layers), active


def check_supported(model: nn.Module, config: GenerationConfig) -> None:
    """Raises Unsupported for models and settings that can't work; others may fail while the graph is captured."""
    base = base_of(model)
    text = base.config.get_text_config()
    name = type(base).__name__
    if not getattr(base, "_can_compile_fullgraph", False):
        raise Unsupported(f"{name} has no static-cache support in transformers")
    if is_spread(base):
        raise Unsupported(f"{name} has its layers on several devices")
    other = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if other:
        raise Unsupported(f"{name} has layers of other kinds: {', '.join(sorted(other))}")
    if "dynamic" in str(getattr(text, "rope_parameters", None)):
        raise Unsupported(f"{name} recomputes its rotary frequencies as a text grows")
    if config.top_k not in (0, None) or config.top_p not in (1.0, None) or config.num_beams not in (1, None):
        raise Unsupported("top-k, top-p and beams are not sampled statically")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """In what the present autocast computes; None without one."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def device_memory(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")


@dataclass(eq=False)
class StaticDecoding:
    """All decoders of one model. They share the memory of their caches, which grows to the largest shape."""

    seconds: float = 0.0  # spent on capturing graphs
    captures: int = 0
    generations: int = 0
    decoders: dict[tuple, Decoder] = field(default_factory=dict)  # by shape and sampling, as long as no weight moves
    casts: dict[torch.dtype, CastWeights] = field(default_factory=dict)  # of fp32 weights, by autocast's dtype
    _storage: list[torch.Tensor] = field(default_factory=list)  # of keys and values of each layer
    # Whether the fused step is that of few rows, or None if steps are not fused; by dtype, rows and adapters.
    _fuses: dict[tuple, bool | None] = field(default_factory=dict)
    _passes: dict[torch.dtype, bool] = field(default_factory=dict)  # whether few prompts are read by a `PromptPass`
    _likes: dict[torch.dtype | None, list] = field(default_factory=dict)  # see `_like`, by autocast's dtype
    _stays: bool = False  # the caches and graphs stayed after the last generation
    _addresses: int | None = None
    _adapters: tuple = ()
    _pool: Any = None

    @torch.no_grad()
    def __call__(
        self,
        model: nn.Module,
        prompts: torch.Tensor,
        prompt_mask: torch.Tensor,
        config: GenerationConfig,
        uniforms: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Completions (B, max_new_tokens) of left-padded prompts (B, P), with pad tokens after a stop token.

        Args:
            uniforms: the noise of each token, see `gkd.generation.sampling.uniform_noise`; None if `config` is greedy.

        Raises:
            Unsupported: see `check_supported`.
            NotFinite: the logits are not.
            RuntimeError: a graph can't capture the model, or memory is short.
        """
        check_supported(model, config)
        self._adapters = _state_of_adapters(model)
        addresses = hash(tuple(p.data_ptr() for p in model.parameters()))
        if addresses != self._addresses:  # graphs read weights at fixed ones
            self.release()
            self._addresses = addresses
        texts = torch.full((len(prompts), config.max_new_tokens), config.pad_token_id, device=prompts.device)
        with self.cast_weights(model, prompts.device):
            decoder = self._read_prompts(model, prompts, prompt_mask, config, uniforms)
            rows = torch.arange(len(prompts), device=prompts.device)
            while True:
                live = decoder.run()
                texts[rows] = decoder.out[: len(rows)]
                if not live:
                    break
                kept = (~decoder.finished[: len(rows)]).nonzero()[:, 0]
                smaller = self._decoder_for(model, decoder.layers, fewer_rows(live), len(decoder.columns), config)
                smaller.take(decoder, kept)
                self._make_ready(smaller)
                decoder, rows = smaller, rows[kept]
        if bool(decoder.bad):
            raise NotFinite
        if not self._may_stay(prompts.device):
            del decoder
            self.release()
        return texts

    def _read_prompts(self, model, prompts, prompt_mask, config, uniforms) -> Decoder:
        """A decoder that has read the prompts, and chosen the first token of each."""
        rows = batch_bucket(len(prompts))
        few = padded(prompts, prompt_mask, rows)
        length = length_bucket((prompts if few is None else few[0]).shape[1] + config.max_new_tokens)
        decoder = self._decoder_for(model, self._like(model, prompts.device), rows, length, config)
        logits = None if few is None else self._read_few(decoder, few, (prompts, prompt_mask))
        decoder.begin(prompt_mask if logits is None else few[1], uniforms)
        if logits is None:
            first = self._read_in_chunks(decoder, prompts, prompt_mask, uniforms)
        else:
            first = decoder.choose(logits, None if uniforms is None else uniforms[:, 0])
        decoder.accept(F.pad(first, (0, decoder.rows - len(prompts))))
        self._make_ready(decoder)
        return decoder

    def _like(self, model: nn.Module, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of one token, (1, H, 1, D), of each layer."""
        dtype = autocast_dtype(device)
        if dtype not in self._likes:
            ids, cache = torch.zeros(1, 1, dtype=torch.long, device=device), DynamicCache()
            next_logits(model, ids, torch.ones_like(ids), ids, cache)
            self._likes[dtype] = [(layer.keys, layer.values) for layer in cache.layers]
        return self._likes[dtype]

    def _read_in_chunks(self, decoder, prompts, prompt_mask, uniforms) -> torch.Tensor:
        """First tokens (B,), by the model's unchanged forward."""
        size, first = max(1, PROMPT_TOKENS // prompts.shape[1]), []
        positions = positions_of(prompt_mask)
        for start in range(0, len(prompts), size):
            rows, cache = slice(start, min(start + size, len(prompts))), DynamicCache()
            logits = next_logits(decoder.model, prompts[rows], prompt_mask[rows], positions[rows], cache)
            decoder.take_prompts(rows, cache)
            first.append(decoder.choose(logits, None if uniforms is None else uniforms[rows, 0]))
        return torch.cat(first)

    def _read_few(self, decoder: Decoder, few: tuple, prompts: tuple) -> torch.Tensor | None:
        """Logits (B, V) of `few`, the `padded` prompts and their mask, by a `PromptPass`; None where it is not right, which
        its first result shows beside that of the model's unchanged forward of `prompts`, which are not padded."""
        dtype, device = decoder.zero.dtype, few[0].device
        if self._passes.get(dtype) is False:
            return None
        started = time.perf_counter()
        captures = device.type == "cuda" and few[0].shape[1] not in decoder.passes
        if captures:
            torch.cuda.synchronize()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            logits = decoder.read(*few, self._pool)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a capture, or of a model that takes no such masks
            self._passes[dtype] = False
            logger.info(f"Prompts are read without a graph: {first_line(error)}")
            return None
        if dtype not in self._passes:
            expected = next_logits(decoder.model, *prompts, positions_of(prompts[1]), DynamicCache())
            reason = difference(logits, expected, dtype)
            self._passes[dtype] = reason is None
            if reason is not None:
                logger.info(f"Prompts are read without a graph: {reason}")
                return None
        if captures:
            torch.cuda.synchronize()
            self.seconds += time.perf_counter() - started
        return logits

    def _make_ready(self, decoder: Decoder) -> None:
        """Fuses a new decoder's step if the model allows it, and captures it, on a GPU; its state stays."""
        if decoder.graph is not None or decoder.token.device.type != "cuda" or bool(decoder.finished.all()):
            return
        tile = max(16, decoder.rows) if decoder.rows <= FEW_ROWS else None  # kernels differ by it
        kind = decoder.zero.dtype, tile, self._adapters
        if kind not in self._fuses:
            self._fuses[kind] = self._fuse(decoder, tile is not None)
        elif (few := self._fuses[kind]) is not None:
            decoder.fused = FusedStep(decoder.model, decoder.layers, few)
        torch.cuda.synchronize()
        started = time.perf_counter()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        decoder.capture(self._pool)
        torch.cuda.synchronize()
        self.seconds += time.perf_counter() - started
        self.captures += 1

    @staticmethod
    def _fuse(decoder: Decoder, few: bool) -> bool | None:
        """Fuses the decoder's step, for few rows if they are `few` and that is right; see `_fuses`."""
        reason = unsupported(decoder.model)
        for choice in [] if reason else [True, False] if few else [False]:
            if (reason := decoder.fuse(choice)) is None:
                return choice
        logger.info(f"Decoding steps are not fused: {reason}")
        return None

    def _may_stay(self, device: torch.device) -> bool:
        """Whether caches and graphs fit beside what training needs, as far as its peak is known."""
        total, size = device_memory(device), sum(part.nbytes for part in self._storage)
        self.generations += 1
        if size > KEPT_SHARE * total:
            peak = torch.cuda.max_memory_allocated(device) + (0 if self._stays else size)
            self._stays = self.generations > 1 and peak < MOST_SHARE * total
        else:
            self._stays = True
        return self._stays

    def release(self) -> None:
        """Frees graphs, caches and cast weights."""
        self._drop_decoders()
        self.casts.clear()

    def _drop_decoders(self) -> None:
        self.decoders.clear()
        self._storage, self._pool = [], None

    def cast_weights(self, model: nn.Module, device: torch.device) -> AbstractContextManager:
        """Inside the context, under autocast, linear layers use copies of fp32 weights, if these fit in memory."""
        dtype = autocast_dtype(device)
        layers = [layer for layer in free_linears(model) if layer.weight.dtype is torch.float32]
        weights = sum(layer.weight.numel() for layer in layers)
        if dtype is None or weights * dtype.itemsize > CAST_SHARE * device_memory(device):
            return nullcontext()
        return self.casts.setdefault(dtype, CastWeights()).used_by(layers)

    def _decoder_for(self, model, like: list, rows: int, length: int, config: GenerationConfig) -> Decoder:
        """A decoder of this shape; `like` has keys and values of each layer, whose heads and widths its cache takes."""
        sampling = config.max_new_tokens, config.do_sample, config.temperature, config.pad_token_id
        ids = tuple(config.eos_token_id or []), len(config.suppress_tokens or [])
        tensors = [tensor for pair in like for tensor in pair]
        device = tensors[0].device
        casting = autocast_dtype(device)
        # Under autocast, rotary embeddings turn bf16 keys into fp32 ones, which attention casts back.
        dtype = casting or tensors[0].dtype
        shapes = [(rows, tensor.shape[1], length, tensor.shape[3]) for tensor in tensors]
        sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
        fits = [part.nbytes >= size for part, size in zip(self._storage, sizes, strict=False)]
        if not fits or not all(fits):
            self._drop_decoders()
            self._storage = [torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes]
        key = (rows, length, self._adapters, casting, *sampling, *ids)
        if key not in self.decoders:
            parts = zip(self._storage, sizes, shapes, strict=True)
            views = [part[:size].view(dtype).view(shape) for part, size, shape in parts]
            layers = list(zip(views[::2], views[1::2], strict=True))
            self.decoders[key] = Decoder(model, config, layers, rows, length, device)
        return self.decoders[key]
