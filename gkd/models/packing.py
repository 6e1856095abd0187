"""Rows without their padding, one after another in a line, for a forward that computes no padding.

A line has positions that start anew with each row, and attention that stays within a row: PyTorch's own for variable
lengths, on a GPU in half precision. Whether an architecture can be run so is measured once, on a few tokens.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from torch import nn
from torch.func import functional_call
from torch.nn.attention import varlen
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gkd.io.errors import first_line
from gkd.io.replaced import replaced
from gkd.models.heads import base_of, last_hidden_states, modes_kept

logger = get_logger(__name__)

_NAME = "gkd_packed"  # of the attention, for transformers
# What it takes the place of; also of itself, where two models share a config.
_REPLACED = ("sdpa", "flash_attention_2", "flash_attention_3", _NAME)
_DEVICES = ("cuda",)  # tests add the CPU
# Versions of PyTorch without this argument share key heads without it.
_SHARES_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}


def padded_length(length: int) -> int:
    """Rounds up to one of 16 lengths an octave, or to 32."""
    step = max(32, 2 ** (length.bit_length() - 5))
    return -(-length // step) * step


def _power_of_two(number: int) -> int:
    """Rounds up."""
    return 1 << (number - 1).bit_length()


@dataclass
class Line:
    """R rows as one line of T tokens. Filling up to T is a row of its own, as are the empty rows at the end.

    Attributes:
        ids, positions: (1, T).
        ends: int32 (R + 1), where rows start and end.
        longest: of a row, at most so many tokens; a power of two.
        scored: (N,), the scored positions in the line.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor
    longest: int
    scored: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, scored: torch.Tensor, lengths: torch.Tensor) -> "Line":
        """The line of right-padded ids (B, L) with flat scored positions (N,).

        Few shapes come of many lengths: T is a `padded_length`, and what the kernel of the attention may find in it, rows
        and their longest, powers of two that mostly follow from T.

        Args:
            lengths: int64 (B,) on the CPU, tokens of each row.
        """
        (rows, width), device = ids.shape, ids.device
        used = lengths.numpy()
        total = int(used.sum())
        fill = padded_length(total) - total
        starts = np.cumsum(used) - used
        room = _power_of_two(max(rows + 1, 8, (total + fill) // 512))  # one is the filling
        shift = np.arange(rows) * width - starts  # from a position in the line to one in (B · L)
        positions = np.concatenate([np.arange(total) - np.repeat(starts, used), np.arange(fill)])
        source = np.arange(total) + np.repeat(shift, used)
        ends = np.full(room + 1, total + fill)
        ends[: rows + 1] = [*starts, total]
        source, positions, ends, shift = (
            _moved(torch.from_numpy(part), device) for part in (source, positions, ends.astype(np.int32), shift)
        )
        line = F.pad(ids.flatten().index_select(0, source), (0, fill))
        longest = _power_of_two(max(int(used.max(initial=1)), fill, 64, min((total + fill) // 4, 2048)))
        return cls(line[None], positions[None], ends, longest, scored - shift.index_select(0, scored // width))

    @property
    def shape(self) -> tuple[int, int, int]:
        """What the kernels of a forward depend on."""
        return self.ids.shape[1], len(self.ends), self.longest


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, without waiting for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _packed_attention(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    row_ends: torch.Tensor,
    longest_row: int,
    **options,
) -> tuple[torch.Tensor, None]:
    """Attention within the rows of a line, as transformers calls it: query (1, heads, T, D), key and value (1, kv heads, T, D) -> (1, T, heads, D).

    Raises NotImplementedError for what PyTorch's kernel has not.
    """
    other = sorted(name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None)
    if other or dropout or getattr(module, "is_causal", True) is False:
        raise NotImplementedError(f"attention with {', '.join(other) or 'dropout, or not causal'}")
    before = -1 if sliding_window is None else sliding_window - 1
    query, key, value = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))  # (T, heads, D)
    if not query.is_cuda:
        return _attention_by_rows(query, key, value, row_ends, scaling, before)[None], None
    where = row_ends, row_ends, longest_row, longest_row
    out = varlen.varlen_attn(query, key, value, *where, scale=scaling, window_size=(before, 0), **_SHARES_HEADS)
    return out[None], None


def _attention_by_rows(query, key, value, row_ends: torch.Tensor, scaling: float | None, before: int) -> torch.Tensor:
    """`_packed_attention` on a CPU, for tests: (T, heads, D) -> (T, heads, D)."""
    rows = []
    for start, end in zip(row_ends.tolist(), row_ends.tolist()[1:], strict=False):
        q, k, v = (states[start:end].transpose(0, 1) for states in (query, key, value))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & (distance <= before if before >= 0 else True)
        rows.append(F.scaled_dot_product_attention(q, k, v, seen, scale=scaling, enable_gqa=True).transpose(0, 1))
    return torch.cat(rows)


def _attention(module, query, key, value, attention_mask, row_ends=None, **options):
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"] if row_ends is None else partial(_packed_attention, row_ends=row_ends)
    return attend(module, query, key, value, attention_mask, **options)


def _mask(*args, **options):
    return None if _building_line.get() else masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **options)


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _mask)
_building_line = ContextVar("building_line", default=False)


@contextmanager
def attends_by_row(model: nn.Module) -> Iterator[None]:
    """Inside the context, a model's attention stays within the rows of a line. Needed in forward and backward.

    A checkpointed layer runs again in the backward, and looks up its attention again.
    """
    base = base_of(model)
    configs = list({id(c): c for c in (base.config, base.config.get_text_config())}.values())
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = _NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def line_states(model: nn.Module, line: Line, weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """The last hidden states (1, T, H) of a line, as `last_hidden_states`, inside `attends_by_row`.

    Args:
        weights: to use in place of the model's own, by their names in its body.
    """
    body = base_of(model).base_model
    options = {"input_ids": line.ids, "position_ids": line.positions, "use_cache": False}
    options |= {"row_ends": line.ends, "longest_row": line.longest}
    building = _building_line.set(True)
    try:
        # transformers would look for rows in the positions, which waits for the GPU.
        with replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None):
            return functional_call(body, weights, kwargs=options)[0] if weights else body(**options)[0]
    finally:
        _building_line.reset(building)


@torch.no_grad()
def can_pack(model: nn.Module, device: torch.device, who: str, trains: bool = False) -> bool:
    """Whether rows of a line get the hidden states that they get alone; if not, a line of the log says why.

    Called under the autocast that the forward will run in. Collective if weights are sharded.

    Args:
        trains: whether there is a backward too, and what training mode adds.
    """
    base = base_of(model)
    replaces = getattr(base.config, "_attn_implementation", None) in _REPLACED
    # As for flash attention, windows come as arguments: one that only a mask tells of would not show in a few tokens.
    if device.type not in _DEVICES or not (replaces and getattr(base, "_supports_flash_attn", False)):
        return False
    lengths = torch.tensor([5, 9])
    ids = (torch.arange(18, device=device).view(2, 9) + 4) % base.config.get_text_config().vocab_size
    other = torch.stack([ids[0].flip(0), ids[1]])  # another first row
    real = torch.arange(9) < lengths[:, None]
    lines = [Line.of(rows, real.flatten().nonzero()[:, 0].to(device), lengths) for rows in (ids, other)]
    try:
        with modes_kept(model), attends_by_row(model):
            model.eval()
            alone = last_hidden_states(model, ids, None)[real.to(device)]
            packed, beside_other = (line_states(model, line)[0, line.scored] for line in lines)
            if trains:
                _rehearse_training(model, lines[0])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any: an architecture may not know what it is called with
        logger.info(f"Rows of the {who} are padded, not packed: {first_line(error)}")
        return False
    # Two kernels differ by rounding; one that sees the row before would differ from itself.
    off, leak = _apart(packed, alone), _apart(packed[5:], beside_other[5:])
    if off < 0.1 and leak < 0.002:
        return True
    logger.info(
        f"Rows of the {who} are padded, not packed: hidden states of packed rows differ by {max(off, leak):.1%}"
    )
    return False


def _rehearse_training(model: nn.Module, line: Line) -> None:
    """Raises what the backward raises, such as for heads too wide for a GPU's, or training mode, such as for dropout."""
    for name, weight in base_of(model).base_model.named_parameters():
        if weight.requires_grad:
            with torch.enable_grad():
                leaf = weight.detach().requires_grad_()  # of its own, without the hooks of DDP
                torch.autograd.grad(line_states(model, line, {name: leaf}).sum(), leaf, allow_unused=True)
            break  # the first, behind all layers of the backward
    with torch.random.fork_rng([line.ids.device] if line.ids.is_cuda else []):
        model.train()
        line_states(model, line)


def _apart(states: torch.Tensor, others: torch.Tensor) -> float:
    """The largest relative distance of a token's states."""
    return float(((states - others).float().norm(dim=1) / others.float().norm(dim=1)).max())
