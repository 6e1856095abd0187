"""The state of decoding some rows with a static KV cache, and its step, one token for all rows, as a CUDA graph.

A step computes the same as the model's forward: it calls the model's modules with our cache (`_StaticLayer`) and our
attention function for a single query token, or is a `FusedStep`.
"""

import inspect
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gkd.generation.fused import FusedStep
from gkd.generation.prompts import GivenLayer, PromptPass
from gkd.generation.sampling import draw
from gkd.io.errors import first_line
from gkd.io.replaced import replaced
from gkd.models.graphs import side_stream
from gkd.models.heads import LogitHead, base_of

# The CPU checks only every so many steps whether all rows have finished, since that waits for the GPU.
_STEPS_BETWEEN_CHECKS = 16
_ATTENTION = "gkd_single_token"


class Unsupported(Exception):
    """This model or configuration can't be decoded statically; the message says why."""


def fewer_rows(rows: int) -> int:
    """The batch size with which a generation goes on when only so many rows have not finished."""
    return max(8, 1 << (rows - 1).bit_length())


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


class _StaticLayer(GivenLayer):
    """New keys and values go to column `slot`, a tensor (1,) that replays read."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor):
        super().__init__(keys, values)
        self.slot = slot

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys.index_copy_(2, self.slot, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.slot, value_states.to(self.values.dtype))
        return self.keys, self.values


def cache_argument(body: nn.Module) -> str:
    """The name of the cache in a model's forward: transformers 5.24 renamed `past_key_values`."""
    return "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"


def next_logits(model: nn.Module, ids, mask, positions, cache: Cache) -> torch.Tensor:
    """(B, q) ids -> (B, V) logits after the last of them."""
    body = base_of(model).base_model
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, cache_argument(body): cache}
    hidden = body(**inputs, use_cache=True)[0]
    return LogitHead.of(model)(hidden[:, -1])


def difference(logits: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> str | None:
    """By how much logits differ from those expected; None if by no more than rounding to `dtype` explains."""
    error = float((logits.float() - expected.float()).norm() / expected.float().norm())
    return None if error <= (1e-3 if dtype is torch.float32 else 0.05) else f"its logits differ by {error:.1%}"


class Decoder:
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
            return next_logits(self.model, self.token, self._masks(seen, self.slot), self.position, self.cache)
        hidden = fused(self.token, self.position, self.start, self.finished, self.slot)
        return LogitHead.of(self.model)(hidden[:, -1])

    def fuse(self, few: bool) -> str | None:
        """Decodes by this `FusedStep` from here on, if its logits are the model's now; else the reason why not."""
        live = ~self.finished
        try:
            fused = FusedStep(self.model, self.layers, few)
            with _our_attention(self.model):
                logits, expected = self._logits(fused)[live], self._logits(None)[live]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton has errors of several kinds
            return first_line(error)
        reason = difference(logits, expected, self.zero.dtype)
        if reason is None:
            self.fused = fused
        return reason

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
            self.passes[width] = PromptPass(self.layers, width, partial(next_logits, self.model), self._masks)
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

    def take(self, other: "Decoder", rows: torch.Tensor) -> None:
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
