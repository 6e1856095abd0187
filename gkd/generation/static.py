"""Decoding with a static KV cache: a step, one token for all rows, is a CUDA graph that is captured once and replayed.

An eager step of a 1B model launches about 700 small kernels, and the GPU waits for the CPU most of the time; a replay
launches them all at once. Capturing takes an eager step or two (a second, against a minute of compiling), so new shapes
are cheap; lengths are still rounded up to keep them few.

A step computes the same as the model's forward: it calls the model's modules with our cache (`_StaticLayer`) and our
attention function for a single query token. Prompts are read by the model's unchanged forward.
"""

import inspect
import logging
import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import Cache, StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gkd.generation.fused import FusedStep, unsupported
from gkd.generation.linears import CastWeights, free_linears
from gkd.generation.products import FEW_ROWS
from gkd.generation.prompts import PromptPass, padded
from gkd.generation.sampling import NotFinite, draw
from gkd.io.errors import first_line
from gkd.io.replaced import replaced
from gkd.models.graphs import side_stream
from gkd.models.heads import LogitHead, base_of

logger = logging.getLogger(__name__)

# The CPU checks only every so many steps whether all rows have finished, since that waits for the GPU.
_STEPS_BETWEEN_CHECKS = 16
# Up to this share of the device's memory, the cache and its graphs are kept between generations; a larger cache is if
# the peak of a training step leaves room, up to the other share.
KEPT_SHARE, MOST_SHARE = 0.02, 0.9
# Up to this share, rows generate together.
CACHE_SHARE = 0.2
# Prompts are read by as many rows at a time as have this many tokens.
PROMPT_TOKENS = 2**15
# Up to this share, copies of fp32 weights in autocast's dtype are kept too; larger models are cast at each token.
CAST_SHARE = 0.05
_ATTENTION = "gkd_single_token"


class Unsupported(Exception):
    """This model or configuration can't be decoded statically; the message says why."""


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
    size = (_autocast_dtype(device) or model.dtype).itemsize * 2 * text.num_hidden_layers * kv_heads * width
    return rows_of_share(device_memory(device), size * length_bucket(length))


def rows_of_share(memory: float, size: int) -> int:
    """How many rows, with a cache of `size` bytes each, generate together in a GPU of this memory."""
    return max(1, int(CACHE_SHARE * memory / size))


def fewer_rows(rows: int) -> int:
    """The batch size with which a generation goes on when only so many rows have not finished."""
    return max(8, 1 << (rows - 1).bit_length())


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


def _uncached_autocast() -> AbstractContextManager:
    """For a capture: autocast frees its cached casts on exit, while the graph still reads them."""
    return torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False)


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
    """(B, q) ids -> (B, V) logits after the last of them."""
    body = base_of(model).base_model
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, cache_argument(body): cache}
    hidden = body(**inputs, use_cache=True)[0]
    return LogitHead.of(model)(hidden[:, -1])


class _Decoder:
    """State and graph of decoding `rows` texts of up to `length` tokens, prompt included.

    Attributes:
        fused: computes the step's hidden states, in place of the model's forward.
        steps: tokens decoded so far.
    """

    def __init__(self, model: nn.Module, config: GenerationConfig, layers: list, rows: int, length: int, device):
        self.model, self.config, self.layers, self.rows = model, config, layers, rows
        self.graph = self.fused = None
        self.steps = 0
        zeros = partial(torch.zeros, dtype=torch.long, device=device)
        self.slot, self.step = zeros(1), zeros(1)
        self.cache = Cache(layers=[_StaticLayer(keys, values, self.slot) for keys, values in layers])
        self.columns = torch.arange(length, device=device)
        self.start = zeros(rows)  # the column of a row's first token
        self.token, self.position = zeros(rows, 1), zeros(rows, 1)
        self.finished = zeros(rows, dtype=torch.bool)
        self.out = zeros(rows, config.max_new_tokens)
        self.uniforms = zeros(rows, config.max_new_tokens, dtype=torch.float64) if config.do_sample else None
        self.bad = zeros(1, dtype=torch.bool)  # logits were not finite
        self.stops = torch.tensor(config.eos_token_id or [], dtype=torch.long, device=device)
        self.zero = zeros((), dtype=layers[0][0].dtype)
        self.passes: dict[int, PromptPass] = {}  # by the width of prompts
        text = base_of(model).config.get_text_config()
        self.kinds = set(getattr(text, "layer_types", None) or [])
        slides = getattr(text, "use_sliding_window", True) and ("sliding_attention" in self.kinds or not self.kinds)
        self.window = getattr(text, "sliding_window", None) if slides else None

    def _masks(self, seen: torch.Tensor, slot: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Additive masks (B, 1, Q, K) of tokens in the columns `slot` (Q, 1) or (1,), each of which sees tokens (B, 1, Q, K)."""
        least = torch.finfo(self.zero.dtype).min  # -inf in all columns, as for padding, would be NaN
        full = torch.where(seen, self.zero, least)
        if self.window is None:
            return full
        near = torch.where(seen & (self.columns[: seen.shape[-1]] > slot - self.window), self.zero, least)
        return {"full_attention": full, "sliding_attention": near} if self.kinds else near

    def _logits(self, fused: FusedStep | None) -> torch.Tensor:
        """(B, V) after the token at `slot`."""
        if fused is None:
            seen = ((self.columns >= self.start[:, None]) & (self.columns <= self.slot))[:, None, None]
            return _forward(self.model, self.token, self._masks(seen, self.slot), self.position, self.cache)
        hidden = fused(self.token, self.position, self.start, self.finished, self.slot)
        return LogitHead.of(self.model)(hidden[:, -1])

    def fuse(self, few: bool) -> str | None:
        """Decodes by this `FusedStep` from here on, if its logits are the model's now; else the reason why not."""
        live = ~self.finished
        try:
            fused = FusedStep(self.model, self.layers, few)
            with _our_attention(self.model):
                logits, expected = self._logits(fused)[live].float(), self._logits(None)[live].float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton has errors of several kinds
            return first_line(error)
        error = float((logits - expected).norm() / expected.norm())
        if not error <= (1e-3 if self.zero.dtype is torch.float32 else 0.05):
            return f"its logits differ by {error:.1%}"
        self.fused = fused
        return None

    def _advance(self) -> None:
        """Decodes one token for each row; changes all state in place."""
        logits = self._logits(self.fused)
        uniform = None if self.uniforms is None else self.uniforms.index_select(1, self.step)[:, 0]
        self.accept(self.choose(logits, uniform))
        self.position += 1
        self.slot += 1

    def choose(self, logits: torch.Tensor, uniform: torch.Tensor | None) -> torch.Tensor:
        """(b, V) logits and (b,) uniforms of the first b rows -> (b,) tokens."""
        if self.config.suppress_tokens:
            first = self.config.suppress_tokens[0]  # padding ids, the last of the vocabulary
            logits[:, first : first + len(self.config.suppress_tokens)] = -torch.inf
        if uniform is None:
            return logits.argmax(-1)
        token, finite = draw(logits, uniform, self.config.temperature)
        self.bad |= (~finite & ~self.finished[: len(finite)]).any()
        return token

    def accept(self, token: torch.Tensor) -> None:
        token = torch.where(self.finished, self.config.pad_token_id, token)
        self.out.index_copy_(1, self.step, token[:, None])
        self.finished |= (token[:, None] == self.stops).any(1)
        self.token.copy_(token[:, None])
        self.step += 1

    def capture(self, pool) -> None:
        """Records `_advance` as a CUDA graph. The state stays, but for later columns of the cache."""
        state = [self.slot, self.step, self.token, self.position, self.finished, self.out, self.bad]
        before = [tensor.clone() for tensor in state]
        # The outer one puts the stream back where memory runs out: a capture that ends with an error does not.
        with torch.cuda.stream(torch.cuda.current_stream()), _uncached_autocast(), _our_attention(self.model):
            with side_stream() as stream:
                for _ in range(2):
                    self.step.zero_()  # of few new tokens there is no second one
                    self._advance()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self._advance()
        torch._foreach_copy_(state, before)
        self.graph = graph

    def read(self, prompts: torch.Tensor, mask: torch.Tensor, pool: Any) -> torch.Tensor:
        """Reads prompts of `padded` width; returns the logits (b, V) after each."""
        width = prompts.shape[1]
        if width not in self.passes:
            self.passes[width] = PromptPass(self.layers, width, partial(_forward, self.model), self._masks)
            if pool is not None:
                with torch.cuda.stream(torch.cuda.current_stream()), _uncached_autocast():
                    self.passes[width].capture(pool)
        return self.passes[width](prompts, mask)

    def begin(self, prompt_mask: torch.Tensor, uniforms: torch.Tensor | None) -> None:
        """Starts with prompts of this mask (b, P); rows beyond b count as finished."""
        rows, width = prompt_mask.shape
        self.start.zero_()
        self.start[:rows] = width - prompt_mask.sum(1)
        self.position.zero_()
        self.position[:rows] = prompt_mask.sum(1, keepdim=True)
        self.slot.fill_(width)
        self.step.zero_()
        self.steps = 1  # the first comes with the prompts
        self.bad.fill_(False)
        self.finished.fill_(True)
        self.finished[:rows] = False
        self.out.fill_(self.config.pad_token_id)
        if uniforms is not None:
            self.uniforms[:rows] = uniforms
        if self.fused is None:
            for keys, values in self.layers:
                keys[:, :, width:].zero_()  # a masked NaN times 0 would still be NaN
                values[:, :, width:].zero_()

    def take_prompts(self, rows: slice, prompt_cache: Cache) -> None:
        """Keys and values of these rows' prompts."""
        for (keys, values), prompts in zip(self.layers, prompt_cache.layers, strict=True):
            keys[rows, :, : prompts.keys.shape[2]].copy_(prompts.keys)
            values[rows, :, : prompts.values.shape[2]].copy_(prompts.values)

    def take(self, other: "_Decoder", rows: torch.Tensor) -> None:
        """Goes on with these rows (n,) of a larger decoder, whose cache lies in the same memory."""
        count, used = len(rows), int(other.slot)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for to, source in zip(mine, theirs, strict=True):
                to[:count, :, :used] = source[:, :, :used].index_select(0, rows)
                if self.fused is None:
                    to[:, :, used:].zero_()
                    to[count:].zero_()
        self.finished.fill_(True)
        of_rows = ["start", "token", "position", "finished", "out"] + ["uniforms"] * self.config.do_sample
        for name in of_rows:
            getattr(self, name)[:count] = getattr(other, name).index_select(0, rows)
        for name in ("slot", "step", "bad"):
            getattr(self, name).copy_(getattr(other, name))
        self.steps = other.steps

    def run(self) -> int:
        """Decodes until no row is left, or so few that a smaller decoder serves them; returns how many."""
        advance = self._advance if self.graph is None else self.graph.replay
        with _our_attention(self.model):
            while self.steps < self.config.max_new_tokens:
                if self.steps % _STEPS_BETWEEN_CHECKS == 1:
                    live = int((~self.finished).sum())
                    few = fewer_rows(live) <= self.rows // 2
                    if live == 0 or (few and self.steps + _STEPS_BETWEEN_CHECKS < self.config.max_new_tokens):
                        return live
                advance()
                self.steps += 1
        return 0


@dataclass(eq=False)
class StaticDecoding:
    """All decoders of one model. They share the memory of their caches, which grows to the largest shape."""

    seconds: float = 0.0  # spent on capturing graphs
    captures: int = 0
    generations: int = 0
    decoders: dict[tuple, _Decoder] = field(default_factory=dict)  # by shape and sampling, as long as no weight moves
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

    def _read_prompts(self, model, prompts, prompt_mask, config, uniforms) -> _Decoder:
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
        dtype = _autocast_dtype(device)
        if dtype not in self._likes:
            ids, cache = torch.zeros(1, 1, dtype=torch.long, device=device), DynamicCache()
            _forward(model, ids, torch.ones_like(ids), ids, cache)
            self._likes[dtype] = [(layer.keys, layer.values) for layer in cache.layers]
        return self._likes[dtype]

    def _read_in_chunks(self, decoder, prompts, prompt_mask, uniforms) -> torch.Tensor:
        """First tokens (B,), by the model's unchanged forward."""
        size, first = max(1, PROMPT_TOKENS // prompts.shape[1]), []
        positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
        for start in range(0, len(prompts), size):
            rows, cache = slice(start, min(start + size, len(prompts))), DynamicCache()
            logits = _forward(decoder.model, prompts[rows], prompt_mask[rows], positions[rows], cache)
            decoder.take_prompts(rows, cache)
            first.append(decoder.choose(logits, None if uniforms is None else uniforms[rows, 0]))
        return torch.cat(first)

    def _read_few(self, decoder: _Decoder, few: tuple, prompts: tuple) -> torch.Tensor | None:
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
            positions = (prompts[1].cumsum(1) - 1).clamp(min=0)
            expected = _forward(decoder.model, *prompts, positions, DynamicCache()).float()
            error = float((logits.float() - expected).norm() / expected.norm())
            self._passes[dtype] = error <= (1e-3 if dtype is torch.float32 else 0.05)
            if not self._passes[dtype]:
                logger.info(f"Prompts are read without a graph, whose logits differ by {error:.1%}")
                return None
        if captures:
            torch.cuda.synchronize()
            self.seconds += time.perf_counter() - started
        return logits

    def _make_ready(self, decoder: _Decoder) -> None:
        """Fuses a new decoder's step if the model allows it, and captures it, on a GPU; its state stays."""
        if decoder.graph is not None or decoder.token.device.type != "cuda" or bool(decoder.finished.all()):
            return
        tile = max(16, batch_bucket(decoder.rows)) if decoder.rows <= FEW_ROWS else None  # kernels differ by it
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
    def _fuse(decoder: _Decoder, few: bool) -> bool | None:
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
        dtype = _autocast_dtype(device)
        layers = [layer for layer in free_linears(model) if layer.weight.dtype is torch.float32]
        weights = sum(layer.weight.numel() for layer in layers)
        if dtype is None or weights * dtype.itemsize > CAST_SHARE * device_memory(device):
            return nullcontext()
        return self.casts.setdefault(dtype, CastWeights()).used_by(layers)

    def _decoder_for(self, model, like: list, rows: int, length: int, config: GenerationConfig) -> _Decoder:
        """A decoder of this shape; `like` has keys and values of each layer, whose heads and widths its cache takes."""
        sampling = config.max_new_tokens, config.do_sample, config.temperature, config.pad_token_id
        ids = tuple(config.eos_token_id or []), len(config.suppress_tokens or [])
        tensors = [tensor for pair in like for tensor in pair]
        device = tensors[0].device
        casting = _autocast_dtype(device)
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
            self.decoders[key] = _Decoder(model, config, layers, rows, length, device)
        return self.decoders[key]
