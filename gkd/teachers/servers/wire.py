"""What a teacher's server and its clients send each other: tensors as safetensors, and settings as JSON in its metadata.

Nothing here runs code that somebody sends. `read_batch`, `read_prompts` and `sampling_of` turn a request into what a model
may be given: whatever they accept, it can compute.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from transformers import GenerationConfig

from gkd.data.batch import Batch

VERSION = 1  # of what is sent
MEDIA = "application/x-safetensors"
# Headers: of each answer, the version and the digest of the teacher's weights; of a request, the seconds that its client waits.
VERSION_HEADER, WEIGHTS_HEADER, WAITS_HEADER = "x-gkd-version", "x-gkd-weights", "x-gkd-waits"

Tensors = dict[str, torch.Tensor]


def pack(tensors: Tensors, **settings: Any) -> bytes:
    """Tensors and settings, which JSON can hold, as a body."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if len(tensors) > 1:  # safetensors takes none that share memory
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return save(tensors, {"gkd": json.dumps({"version": VERSION, **settings})})


def unpack(body: bytes) -> tuple[Tensors, dict[str, Any]]:
    """What `pack` made. Raises ValueError, with one line that says why, for another body."""
    try:
        tensors = load(body)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        settings = json.loads(header["__metadata__"]["gkd"])
        version = settings.pop("version")
    except Exception as error:  # the libraries raise many classes
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"the body is no safetensors of this format: {type(error).__name__}: {why}") from None
    if version != VERSION:
        raise ValueError(
            f"the body has the version {version!r:.20}, and this is version {VERSION}: update the older side"
        )
    return tensors, settings


def bearer(token: str) -> str:
    """The header `Authorization` with a token."""
    return f"Bearer {token}"


def check_token(variable: str, token: str) -> str | None:
    """The token in an environment variable, None where it is empty. Raises ValueError where no header can hold it."""
    if not all("!" <= character <= "~" for character in token):
        raise ValueError(f"{variable} has a character that no HTTP header holds: take letters and digits.")
    return token or None


@dataclass(frozen=True)
class Limits:
    """What a model can read: ids below `ids`, and rows of at most `window` tokens; None if that is not known."""

    ids: int
    window: int | None


def _check(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _only(tensors: Tensors, needed: str, optional: str = "") -> None:
    """Raises ValueError for tensors of other names or dtypes than these."""
    names, known = set(tensors), {*needed.split(), *optional.split()}
    _check(set(needed.split()) <= names, f"it lacks {', '.join(sorted(set(needed.split()) - names))}")
    _check(names <= known, f"it has {sorted(names - known)!r:.60}, and may have {', '.join(sorted(known))}")
    for name, tensor in tensors.items():
        _check(tensor.dtype == torch.int64, f"{name} is {tensor.dtype}, not torch.int64")


def _matrix(tensors: Tensors, name: str, limits: Limits) -> torch.Tensor:
    ids = tensors[name]
    _check(ids.ndim == 2 and ids.numel() > 0, f"{name} has the shape {list(ids.shape)}, not (rows, tokens)")
    low, high = int(ids.min()), int(ids.max())
    wrong = low if low < 0 else high
    _check(0 <= wrong < limits.ids, f"{name} holds the id {wrong}, and the teacher has {limits.ids:,}")
    return ids


def _mask(tensors: Tensors, name: str, ids: torch.Tensor) -> torch.Tensor:
    mask = tensors[name]
    _check(mask.shape == ids.shape, f"{name} has the shape {list(mask.shape)}, and the ids {list(ids.shape)}")
    _check(bool(((mask == 0) | (mask == 1)).all()), f"{name} holds other values than 0 and 1")
    _check(bool(mask.any(1).all()), f"{name} has a row without a token")
    return mask


def read_batch(tensors: Tensors, limits: Limits) -> Batch:
    """What the teacher reads: `input_ids` (B, L) and flat `scored` (N,) with, optionally, `attention_mask` (B, L) or
    `lengths` (B,) of right-padded rows, all int64; `prompted` is there if they are the teacher's own prompts. Raises
    ValueError, which says what is wrong."""
    _only(tensors, "input_ids scored", "attention_mask lengths prompted")
    ids, scored = _matrix(tensors, "input_ids", limits), tensors["scored"]
    width = ids.shape[1]
    _check(
        limits.window is None or width <= limits.window,
        f"input_ids has rows of {width:,} tokens, and the teacher reads {limits.window or 0:,}",
    )
    _check(scored.ndim == 1, f"scored has the shape {list(scored.shape)}, not (positions,)")
    _check(len(scored) <= ids.numel(), f"scored has {len(scored):,} positions, and the rows {ids.numel():,} tokens")
    inside = bool(((scored >= 0) & (scored < ids.numel())).all())
    _check(inside, f"scored holds a position outside of the {ids.numel():,} tokens")
    mask = _mask(tensors, "attention_mask", ids) if "attention_mask" in tensors else None
    lengths = tensors.get("lengths")
    if lengths is not None:
        _check(lengths.shape == ids.shape[:1], f"lengths has the shape {list(lengths.shape)}, not ({len(ids)},)")
        _check(bool(((lengths > 0) & (lengths <= width)).all()), f"lengths holds a number outside of 1 to {width}")
        _check(bool((scored % width < lengths[scored // width]).all()), "scored holds a position behind its row's end")
    if "prompted" not in tensors:
        return Batch(ids, ids, scored, mask, lengths=lengths)
    names = "teacher_input_ids", "teacher_attention_mask", "teacher_scored", "teacher_lengths"
    return Batch(ids, ids, scored, mask, **dict(zip(names, (ids, mask, scored, lengths), strict=True)))


def of_batch(batch: Batch) -> Tensors:
    """The tensors of a batch as its teacher reads them, for `read_batch`."""
    names = ("input_ids", "attention_mask", "scored", "lengths")
    values = (*batch.teacher_inputs, batch.lengths_for_teacher)
    tensors = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    if batch.teacher_input_ids is not None:
        tensors["prompted"] = torch.ones(1, dtype=torch.int64)
    return tensors


def read_prompts(tensors: Tensors, limits: Limits, new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded `prompts` and their `mask`, int64 (B, P), with room for so many new tokens. Raises ValueError."""
    _only(tensors, "prompts mask")
    prompts = _matrix(tensors, "prompts", limits)
    mask = _mask(tensors, "mask", prompts)
    _check(bool((mask.diff(dim=1) >= 0).all()), "mask has padding behind a token: prompts are padded on the left")
    longest = int(mask.sum(1).max())
    _check(
        limits.window is None or longest + new_tokens <= limits.window,
        f"a prompt of {longest:,} tokens and {new_tokens:,} new ones are more than the teacher's {limits.window or 0:,}",
    )
    return prompts, mask


# Of a GenerationConfig, what sampling depends on; `gkd.generation.sampling.sampling_config` sets it.
_SAMPLING = "max_new_tokens do_sample temperature top_k top_p pad_token_id eos_token_id suppress_tokens".split()


def of_sampling(config: GenerationConfig) -> dict[str, Any]:
    """The settings of a configuration, for `sampling_of`."""
    return {name: getattr(config, name) for name in _SAMPLING}


def is_number(value: Any, kind: type | tuple[type, ...] = int, low: float = 0, high: float = math.inf) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value < high


def sampling_of(settings: Any, limits: Limits) -> GenerationConfig:
    """The configuration that `of_sampling` described. Raises ValueError for values that can't be sampled with."""
    _check(isinstance(settings, dict) and settings.keys() == set(_SAMPLING), f"sampling needs {', '.join(_SAMPLING)}")
    new, temperature, top_k, top_p = (settings[n] for n in ("max_new_tokens", "temperature", "top_k", "top_p"))
    _check(is_number(new, low=1, high=2**20), "sampling: max_new_tokens must be a number from 1 on")
    _check(isinstance(settings["do_sample"], bool), "sampling: do_sample must be true or false")
    if settings["do_sample"]:
        positive = is_number(temperature, (int, float)) and temperature > 0
        _check(positive, "sampling: temperature must be above 0")
        _check(top_k == 0 and top_p == 1, "sampling is from the whole distribution: top_k must be 0, and top_p 1")
    greedy = all(value is None or is_number(value, (int, float)) for value in (temperature, top_k, top_p))
    _check(greedy, "sampling: temperature, top_k and top_p must be numbers, or null")
    _check(is_number(settings["pad_token_id"], high=limits.ids), "sampling: pad_token_id is no id of the teacher's")
    for name in ("eos_token_id", "suppress_tokens"):
        ids = settings[name]
        listed = (
            isinstance(ids, list) and 0 < len(ids) < limits.ids and all(is_number(i, high=limits.ids) for i in ids)
        )
        _check(ids is None or listed, f"sampling: {name} must be a list of the teacher's ids, or null")
    return GenerationConfig(use_cache=True, **settings)
