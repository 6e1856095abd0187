"""Triton kernels of a decoding step: what stands between the matrix products of a layer, for one token of each row.

All sums are in fp32. A row's texts lie in columns `start` to `slot` of the cache, and a finished row is not read.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch

from gkd.io.errors import first_line

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it; gkd.generation.fused is then not used
    triton = None

_BLOCK = 64  # columns of the cache that a program reads at a time
_PROGRAMS = 264  # two for each multiprocessor of an H100

if triton is not None:

    @triton.jit
    def _sum(x, part_stride, at, inside, PARTS: tl.constexpr):
        total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            total += tl.load(x + part * part_stride + at, mask=inside, other=0.0).to(tl.float32)
        return total

    @triton.jit
    def _add_norm(x, residual, weight, out, width, eps, part_stride, PARTS: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        inside = at < width
        kept = tl.load(residual + row * width + at, mask=inside, other=0.0)
        if PARTS > 0:
            added = kept.to(tl.float32) + _sum(x + row * width, part_stride, at, inside, PARTS)
            kept = added.to(kept.dtype)
            tl.store(residual + row * width + at, kept, mask=inside)
        value = kept.to(tl.float32)
        value *= tl.rsqrt(tl.sum(value * value) / width + eps)
        scale = tl.load(weight + at, mask=inside, other=0.0)
        value = scale.to(tl.float32) * value.to(kept.dtype).to(tl.float32)
        tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _gate(gate, up, out, count, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(gate + at, mask=at < count, other=0.0)
        silu = (g.to(tl.float32) * tl.sigmoid(g.to(tl.float32))).to(g.dtype)
        value = silu.to(tl.float32) * tl.load(up + at, mask=at < count, other=0.0)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)

    @triton.jit
    def _normed(x, weight, eps, at, inside, width):
        value = x * tl.rsqrt(tl.sum(x * x) / width + eps)
        return value * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _rotate(
        q, k, v, q_bias, k_bias, v_bias, cos, sin, q_weight, k_weight, q_out, keys, values, slot,
        q_stride, k_stride, part_stride, row_stride, head_stride, width, eps,
        HEADS: tl.constexpr, KV_HEADS: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        at = tl.arange(0, BLOCK)
        inside = at < width
        column = tl.load(slot)
        if head >= HEADS + KV_HEADS:
            head -= HEADS + KV_HEADS
            value = _sum(v + row * k_stride + head * width, part_stride, at, inside, PARTS)
            if BIAS:
                value += tl.load(v_bias + head * width + at, mask=inside, other=0.0).to(tl.float32)
            place = values + row * row_stride + head * head_stride + column * width + at
            tl.store(place, value.to(values.dtype.element_ty), mask=inside)
        else:
            half = width // 2
            other = tl.where(at < half, at + half, at - half)  # the element that it is rotated with
            c = tl.load(cos + row * width + at, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(sin + row * width + at, mask=inside, other=0.0).to(tl.float32)
            s = tl.where(at < half, -s, s)
            source, bias = q + row * q_stride + head * width, q_bias + head * width
            if head >= HEADS:
                source, bias = k + row * k_stride + (head - HEADS) * width, k_bias + (head - HEADS) * width
            x = _sum(source, part_stride, at, inside, PARTS)
            y = _sum(source, part_stride, other, inside, PARTS)
            if BIAS:
                x += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
                y += tl.load(bias + other, mask=inside, other=0.0).to(tl.float32)
            if NORM:
                if head < HEADS:
                    x, y = (
                        _normed(x, q_weight, eps, at, inside, width),
                        _normed(y, q_weight, eps, other, inside, width),
                    )
                else:
                    x, y = (
                        _normed(x, k_weight, eps, at, inside, width),
                        _normed(y, k_weight, eps, other, inside, width),
                    )
            x = x * c + y * s
            if head < HEADS:
                tl.store(q_out + (row * HEADS + head) * width + at, x.to(q_out.dtype.element_ty), mask=inside)
            else:
                place = keys + row * row_stride + (head - HEADS) * head_stride + column * width + at
                tl.store(place, x.to(keys.dtype.element_ty), mask=inside)

    @triton.jit
    def _attend(
        q, keys, values, start, finished, slot, sums, stats,
        row_stride, head_stride, scale, window, softcap, width, split, splits,
        KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """The part of attention over `split` columns, for the GROUP query heads that share a key head."""
        pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        row, head = pair // KV_HEADS, pair % KV_HEADS
        end = tl.load(slot) + 1
        begin = tl.load(start + row)
        if WINDOW:
            begin = tl.maximum(begin, end - window)
        low, high = tl.maximum(begin, part * split), tl.minimum(end, (part + 1) * split)
        if tl.load(finished + row):
            high = low
        of_group, at = tl.arange(0, ROWS), tl.arange(0, BLOCK)
        in_group, inside = of_group < GROUP, at < width
        both = in_group[:, None] & inside[None, :]
        query = tl.load(q + (pair * GROUP + of_group[:, None]) * width + at[None, :], mask=both, other=0.0)
        most = tl.full((ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        summed = tl.zeros((ROWS, BLOCK), tl.float32)
        base = row * row_stride + head * head_stride
        for first in range(low, high, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            seen = column < high
            place = base + column.to(tl.int64)[:, None] * width + at[None, :]
            block = tl.load(keys + place, mask=seen[:, None] & inside[None, :], other=0.0)
            score = tl.dot(query, tl.trans(block), input_precision=PRECISION) * scale
            if SOFTCAP:
                score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)  # tanh
            score = tl.where(seen[None, :], score, -float("inf"))
            higher = tl.maximum(most, tl.max(score, 1))
            weight = tl.exp(score - higher[:, None])
            shrink = tl.exp(most - higher)
            total = total * shrink + tl.sum(weight, 1)
            block = tl.load(values + place, mask=seen[:, None] & inside[None, :], other=0.0)
            summed = summed * shrink[:, None] + tl.dot(weight.to(block.dtype), block, input_precision=PRECISION)
            most = higher
        place = (pair * splits + part) * GROUP + of_group
        tl.store(stats + 2 * place, most, mask=in_group)
        tl.store(stats + 2 * place + 1, total, mask=in_group)
        if high > low:
            tl.store(sums + place[:, None] * width + at[None, :], summed, mask=both)

    @triton.jit
    def _combine(sums, stats, out, width, splits, GROUP: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
        head = tl.program_id(0).to(tl.int64)  # of all rows
        pair, member = head // GROUP, head % GROUP
        part, at = tl.arange(0, SPLITS), tl.arange(0, BLOCK)
        place = (pair * splits + part) * GROUP + member
        most = tl.load(stats + 2 * place, mask=part < splits, other=-float("inf"))
        total = tl.load(stats + 2 * place + 1, mask=part < splits, other=0.0)
        highest = tl.maximum(tl.max(most), -1e30)  # a finished row has none
        weight = tl.exp(most - highest)
        used = (total > 0)[:, None] & (at < width)[None, :]
        parts = tl.load(sums + place[:, None] * width + at[None, :], mask=used, other=0.0)
        value = tl.sum(parts * weight[:, None], 0) / tl.maximum(tl.sum(total * weight), 1e-30)
        tl.store(out + head * width + at, value.to(out.dtype.element_ty), mask=at < width)

    @triton.jit
    def _log_sum(logits, out, temperature, SIZE: tl.constexpr, BLOCK: tl.constexpr):
        block = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        value = tl.load(logits + block * SIZE + at, mask=at < SIZE, other=-float("inf")).to(tl.float32) / temperature
        most = tl.max(value)
        shift = tl.where(most == -float("inf"), 0.0, most)
        tl.store(out + block, shift + tl.log(tl.sum(tl.exp(value - shift))))


def log_sums(blocks: torch.Tensor, temperature: float) -> torch.Tensor:
    """log Σ exp(x / temperature) over the last dimension of (B, n, size), in fp32."""
    if blocks.device.type != "cuda" or not works():
        return torch.logsumexp(blocks.float() / temperature, -1)
    return _log_sums(blocks, temperature)


@lru_cache
def works() -> bool:
    """Whether Triton is installed and has what it builds kernels with, such as a C compiler; on a GPU."""
    try:
        _log_sums(torch.zeros(1, 1, 16, device="cuda"), 1.0)
    except Exception as error:  # Triton's errors share no class
        reason = "Triton is not installed" if triton is None else f"Triton can't run here: {first_line(error)}"
        logging.getLogger(__name__).warning(f"{reason}. Tokens are drawn and decoded by slower code.")
        return False
    return True


def _log_sums(blocks: torch.Tensor, temperature: float) -> torch.Tensor:
    out = torch.empty(blocks.shape[:-1], device=blocks.device)
    size = blocks.shape[-1]
    options = {"SIZE": size, "BLOCK": triton.next_power_of_2(size), "num_warps": 1}
    _log_sum[out.numel(),](blocks.contiguous(), out, temperature, **options)
    return out


def add_norm(
    x: torch.Tensor | None, residual: torch.Tensor, norm: torch.nn.Module, dtype: torch.dtype
) -> torch.Tensor:
    """Adds x, if given, to `residual` (B, 1, H) in place; returns its RMS norm (B, 1, H) in `dtype`.

    x is (B, 1, H), or has parts of that, (P, B, H).
    """
    rows, width = len(residual), residual.shape[-1]
    out = torch.empty(residual.shape, dtype=dtype, device=residual.device)
    parts = 0 if x is None else x.numel() // residual.numel()
    options = {"PARTS": parts, "BLOCK": triton.next_power_of_2(width), "num_warps": 8 if width > 1024 else 4}
    _add_norm[rows,](
        residual if x is None else x, residual, norm.weight, out, width, norm.variance_epsilon, rows * width,
        **options,
    )  # fmt: skip
    return out


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    out = torch.empty_like(gate)
    _gate[triton.cdiv(gate.numel(), 1024),](gate, up, out, gate.numel(), BLOCK=1024)
    return out


def rotate_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    biases: Sequence[torch.Tensor],
    rotary: tuple[torch.Tensor, torch.Tensor],
    norms: tuple[torch.nn.Module, torch.nn.Module] | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot: torch.Tensor,
) -> torch.Tensor:
    """Rotates q and k; writes k and v to column `slot` of the cache (B, Hkv, L, D); returns q (B, 1, Hq · D).

    Args:
        q, k, v: the parts of their sums, (P, B, Hq · D) and (P, B, Hkv · D); k and v have the same strides.
        biases: of q, k and v, or none.
        rotary: cosines and sines (B, 1, D).
        norms: of q and k, which come before, as in Qwen3.
    """
    rows, kv_heads, _, width = keys.shape
    heads = q.shape[-1] // width
    out = torch.empty(rows, 1, q.shape[-1], dtype=keys.dtype, device=q.device)
    weights = (norms[0].weight, norms[1].weight) if norms else (q, k)
    eps = norms[0].variance_epsilon if norms else 0.0
    _rotate[rows, heads + 2 * kv_heads](
        q, k, v, *(biases or (q, k, v)), *rotary, *weights, out, keys, values, slot,
        q.stride(1), k.stride(1), q.stride(0), keys.stride(0), keys.stride(1), width, eps,
        HEADS=heads, KV_HEADS=kv_heads, NORM=norms is not None, BIAS=bool(biases), PARTS=len(q),
        BLOCK=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip
    return out


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    finished: torch.Tensor,
    slot: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of one token a row, q (B, 1, Hq · D), over columns `start` (B,) to `slot` (1,) of keys and values (B, Hkv, L, D).

    With `window`, over the last `window` of them. The cache is split over programs, so that few rows use the whole GPU,
    and the splits that hold no column of a row, or whose row has `finished` (B,), cost nothing; such a row is 0.
    """
    rows, kv_heads, length, width = keys.shape
    group = q.shape[-1] // width // kv_heads
    splits = max(triton.cdiv(length, 512), min(triton.cdiv(length, _BLOCK), triton.cdiv(_PROGRAMS, rows * kv_heads)))
    split = triton.cdiv(triton.cdiv(length, splits), _BLOCK) * _BLOCK
    splits = triton.cdiv(length, split)
    block = max(triton.next_power_of_2(width), 16)
    sums = torch.empty(rows, kv_heads, splits, group, width, device=q.device)
    stats = torch.empty(rows, kv_heads, splits, group, 2, device=q.device)
    _attend[rows * kv_heads, splits](
        q, keys, values, start, finished, slot, sums, stats, keys.stride(0), keys.stride(1),
        scale, window or 0, softcap or 1.0, width, split, splits,
        KV_HEADS=kv_heads, GROUP=group, WINDOW=window is not None, SOFTCAP=softcap is not None,
        ROWS=max(triton.next_power_of_2(group), 16), BLOCK=block, COLUMNS=_BLOCK,
        PRECISION="ieee" if keys.dtype is torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    out = torch.empty_like(q)
    options = {"GROUP": group, "SPLITS": triton.next_power_of_2(splits), "BLOCK": block, "num_warps": 4}
    _combine[rows * kv_heads * group,](sums, stats, out, width, splits, **options)
    return out
