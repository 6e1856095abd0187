"""Matrix products of few rows in a decoding step, as Triton kernels.

Such a product takes as long as reading its weights, some microseconds, and a library's kernel wastes as much again: it
begins late, and has too few programs to read at full speed. Here one kernel serves the weights that multiply the same
rows, and each sum is split over several programs. The parts of a sum, in fp32, are added by the kernel that reads them.
"""

from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from gkd.generation.linears import CastWeights

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None

FEW_ROWS = 64  # up to this number these kernels are faster than cuBLAS
_PARTS = 4  # of a sum

if triton is not None:

    @triton.jit
    def _multiply(
        x, w0, w1, w2, out, apart, n0, n1, n2, blocks0, blocks1, rows, width, split,
        GATE: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
        STAGES: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """COLUMNS outputs of all rows, a part of their sums: of one of three weights, or with GATE silu(x w0ᵀ) * (x w1ᵀ)."""
        block, part = tl.program_id(0), tl.program_id(1)
        weight, count, offset, wide = w0, n0, 0, n0
        if not GATE:
            wide = n0 + n1 + n2
            if block >= blocks0 + blocks1:
                weight, count, offset = w2, n2, n0 + n1
                block -= blocks0 + blocks1
            elif block >= blocks0:
                weight, count, offset = w1, n1, n0
                block -= blocks0
        row, column = tl.arange(0, ROWS), block * COLUMNS + tl.arange(0, COLUMNS)
        some_rows, total = (row < rows)[:, None], tl.zeros((ROWS, COLUMNS), tl.float32)
        if GATE:  # both products of an output stand side by side
            places = column.to(tl.int64) // 2 * width + column % 2 * apart
            column //= 2
        else:
            places = column.to(tl.int64) * width
        some_columns = (column < count)[:, None]
        for first in tl.range(part * split, tl.minimum((part + 1) * split, width), BLOCK, num_stages=STAGES):
            at = first + tl.arange(0, BLOCK)[None, :]
            if EVEN:
                values = tl.load(x + row[:, None] * width + at, mask=some_rows, other=0.0)
                weights = tl.load(weight + places[:, None] + at, mask=some_columns, other=0.0)
            else:
                values = tl.load(x + row[:, None] * width + at, mask=some_rows & (at < width), other=0.0)
                weights = tl.load(weight + places[:, None] + at, mask=some_columns & (at < width), other=0.0)
            total = tl.dot(values, tl.trans(weights), total, input_precision=PRECISION)
        if GATE:
            gate, up = tl.split(total.reshape(ROWS, COLUMNS // 2, 2))
            total = gate * tl.sigmoid(gate) * up
            column = block * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        place = (part * rows + row[:, None]) * wide + offset + column[None, :]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=some_rows & (column < count)[None, :])


class Weight(NamedTuple):
    """Of a linear layer: (out, in), and its bias (out,) if it has one."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, layer: nn.Module) -> "Weight | None":
        """What `layer` multiplies with, all of it: an adapter that is merged is part of that; None where there is more."""
        if layer._forward_hooks or layer._forward_pre_hooks:
            return None
        replaced = "forward" in vars(layer)
        if isinstance(layer, BaseTunerLayer):
            adds = layer.merged == layer.disable_adapters  # its product beside, or what has to be unmerged first
            return None if adds or replaced else cls.of(layer.get_base_layer())
        if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:  # packed weights have other classes
            return None
        weight, bias = (CastWeights.of(layer) if replaced else [layer.weight, layer.bias]) or (None, None)
        plain = weight is not None and weight.is_contiguous()
        return cls(weight.detach(), None if bias is None else bias.detach()) if plain else None


def products(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """x (B, 1, K) times up to three weights (N, K), beside each other: parts (P, B, ΣN) of the sums, in fp32."""
    out = x.new_empty(_PARTS, len(x), sum(map(len, weights)), dtype=torch.float32)
    _launch(x, weights, out, parts=_PARTS)
    return out


def gated_product(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(x gateᵀ) * (x upᵀ), (B, 1, I), of x (B, 1, K)."""
    out = x.new_empty(*x.shape[:-1], len(gate))
    _launch(x, [gate, up], out, gate=True)
    return out


def _launch(
    x: torch.Tensor, weights: list[torch.Tensor], out: torch.Tensor, gate: bool = False, parts: int = 1
) -> None:
    rows, width, block = len(x), x.shape[-1], 128
    columns = 64 if gate and rows > 16 else 32  # as measured on an H200, like the number of parts, stages and warps
    matrices = [*weights, *[weights[0]] * (3 - len(weights))]
    counts = [*map(len, weights), 0, 0][:3]
    blocks = [triton.cdiv((1 + gate) * count, columns) for count in counts]
    apart = (matrices[1].data_ptr() - matrices[0].data_ptr()) // matrices[0].itemsize
    split = triton.cdiv(triton.cdiv(width, block), parts) * block
    _multiply[blocks[0] if gate else sum(blocks), parts](
        x, *matrices, out, apart, *counts, *blocks[:2], rows, width, split,
        GATE=gate, EVEN=width % block == 0, ROWS=max(16, triton.next_power_of_2(rows)), COLUMNS=columns, BLOCK=block,
        STAGES=4 if rows > 32 and not gate else 3, num_warps=4 if rows > 32 else 2,
        PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
    )  # fmt: skip
