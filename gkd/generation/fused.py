"""A decoding step in a third of the kernels, for models whose layers are Llama's.

Small kernels bound the decoding of a small model: transformers' layer launches 44. This one calls the model's own linear
layers, so adapters, quantized weights and casts do what they do elsewhere, and one kernel of `gkd.generation.kernels`
between each two of them. Its attention reads only the columns that a row uses.
"""

from collections.abc import Sequence

import torch
from torch import nn

from gkd.generation import kernels
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


class FusedStep:
    """The hidden states of one token a row; see `unsupported`.

    Args:
        cache: keys and values of each layer, each (B, Hkv, L, D).
    """

    def __init__(self, model: nn.Module, cache: Sequence[tuple[torch.Tensor, torch.Tensor]]):
        self.body, self.cache = base_of(model).base_model, cache
        of_all = (
            getattr(self.body.config, "sliding_window", None) if self.body.config.model_type == "mistral" else None
        )
        self.windows = [getattr(layer.self_attn, "sliding_window", of_all) for layer in self.body.layers]

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
        x = None
        for layer, (keys, values), window in zip(body.layers, self.cache, self.windows, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            x = kernels.add_norm(x, residual, layer.input_layernorm, dtype)
            norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
            q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
            q = kernels.rotate_and_store(q, k, v, rotary, norms, keys, values, slot)
            x = attention.o_proj(kernels.attend(q, keys, values, start, finished, slot, attention.scaling, window))
            x = kernels.add_norm(x, residual, layer.post_attention_layernorm, dtype)
            x = mlp.down_proj(kernels.gated(mlp.gate_proj(x), mlp.up_proj(x)))
        return kernels.add_norm(x, residual, body.norm, residual.dtype)
