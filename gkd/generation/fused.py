"""A decoding step in a third of the kernels, for models whose layers are Llama's.

Small kernels bound the decoding of a small model: transformers' layer launches 44. This one calls the model's own linear
layers, so adapters, quantized weights and casts do what they do elsewhere, and one kernel of `gkd.generation.kernels`
between each two of them. Its attention reads only the columns that a row uses. Where rows are few and weights plain, the
products are those of `gkd.generation.products`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from gkd.generation import kernels
from gkd.generation.products import Weight, gated_product, products
from gkd.models.heads import base_of

# Models whose layers compute what `FusedStep` does, by type.
_FAMILIES = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}


def unsupported(model: nn.Module) -> str | None:
    """Why the steps of this model can't be fused; None if they can."""
    body = base_of(model).base_model
    config = base_of(model).config.get_text_config()
    if kernels.triton is None or (torch.cuda.is_available() and not kernels.works()):
        return "Triton is not installed, or does not run here"
    if type(body).__name__ not in _FAMILIES or not type(body).__module__.startswith("transformers.models."):
        return f"{type(body).__name__} has layers of its own"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    parts = "self_attn mlp mlp.act_fn input_layernorm post_attention_layernorm".split()
    skipped = [body, body.norm, *body.layers, *(layer.get_submodule(name) for layer in body.layers for name in parts)]
    hooked = (module for module in skipped if module._forward_hooks or module._forward_pre_hooks)
    return next((f"{type(module).__name__} has hooks" for module in hooked), None)


class _Weights(NamedTuple):
    """Of a layer's products, which `gkd.generation.products` computes."""

    qkv: list[torch.Tensor]
    biases: list[torch.Tensor]  # of q, k and v, or none
    o: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def of(cls, layer: nn.Module, dtype: torch.dtype) -> "_Weights | None":
        """None where a projection has more to compute, or another dtype."""
        attention, mlp = layer.self_attn, layer.mlp
        first = [Weight.of(module) for module in (attention.q_proj, attention.k_proj, attention.v_proj)]
        others = [Weight.of(module) for module in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        if None in first or None in others or any(weight.dtype is not dtype for weight, _ in first + others):
            return None
        biases = [bias for _, bias in first if bias is not None]
        if len(biases) not in (0, 3) or any(bias is not None for _, bias in others):
            return None
        return cls([weight for weight, _ in first], biases, *(weight for weight, _ in others))


class FusedStep:
    """The hidden states of one token a row; see `unsupported`.

    Args:
        cache: keys and values of each layer, each (B, Hkv, L, D).
        few: its rows are few, so multiply by `gkd.generation.products`, if the weights allow it.

    Attributes:
        weights: those of each layer, where they do.
    """

    def __init__(self, model: nn.Module, cache: Sequence[tuple[torch.Tensor, torch.Tensor]], few: bool):
        self.body, self.cache = base_of(model).base_model, cache
        of_all = (
            getattr(self.body.config, "sliding_window", None) if self.body.config.model_type == "mistral" else None
        )
        self.windows = [getattr(layer.self_attn, "sliding_window", of_all) for layer in self.body.layers]
        weights = [_Weights.of(layer, cache[0][0].dtype) for layer in self.body.layers] if few else []
        self.weights = weights if None not in weights else []

    def __call__(
        self,
        ids: torch.Tensor,
        position: torch.Tensor,
        start: torch.Tensor,
        finished: torch.Tensor,
        slot: torch.Tensor,
    ) -> torch.Tensor:
        """(B, 1) ids and their positions in the text -> (B, 1, H); writes keys and values to column `slot` (1,).

        `start` (B,) is the column of each row's first token; rows that have `finished` (B,) give garbage.
        """
        body, dtype = self.body, self.cache[0][0].dtype
        residual = body.embed_tokens(ids)
        rotary = tuple(part.contiguous() for part in body.rotary_emb(residual, position))
        x, state = None, (start, finished, slot)
        for i, (layer, (keys, values), window) in enumerate(zip(body.layers, self.cache, self.windows, strict=True)):
            attention, mlp = layer.self_attn, layer.mlp
            norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
            x = kernels.add_norm(x, residual, layer.input_layernorm, dtype)
            weights = self.weights[i] if self.weights else None
            if weights:
                sums = products(x, weights.qkv)
                qkv, biases = sums.split([len(weight) for weight in weights.qkv], -1), weights.biases
            else:
                of = attention.q_proj, attention.k_proj, attention.v_proj
                qkv, biases = [project(x).transpose(0, 1) for project in of], ()
            q = kernels.rotate_and_store(*qkv, biases, rotary, norms, keys, values, slot)
            x = kernels.attend(q, keys, values, *state, attention.scaling, window)
            x = products(x, [weights.o]) if weights else attention.o_proj(x)
            x = kernels.add_norm(x, residual, layer.post_attention_layernorm, dtype)
            if weights:
                x = products(gated_product(x, weights.gate, weights.up), [weights.down])
            else:
                x = mlp.down_proj(kernels.gated(mlp.gate_proj(x), mlp.up_proj(x)))
        return kernels.add_norm(x, residual, body.norm, residual.dtype)
