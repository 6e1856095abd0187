"""The two halves of a causal language model that the loss needs: hidden states, and the head that projects them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Cache, masking_utils

from gkd.io.replaced import replaced


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT or torch.compile wrapper, or the model itself."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restores each module's own mode, training or evaluation, on exit."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            if module.training is not training:
                module.training = training


def last_hidden_states(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, past: Cache | None = None
) -> torch.Tensor:
    """(B, L) ids and mask -> (B, L, H), the input of the model's head, through LoRA layers if there are any.

    Args:
        attention_mask: None: all padding is on the right, where causal attention does not see it.
        past: keys and values of what stands before the ids, which the mask covers too; gets theirs.
    """
    cache = {"use_cache": False} if past is None else {"use_cache": True, "past_key_values": past}
    # Without a mask transformers searches the positions for packed rows, which waits for the GPU. No row is packed.
    packing = replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with packing if attention_mask is None else nullcontext():
        return base_of(model).base_model(input_ids=input_ids, attention_mask=attention_mask, **cache)[0]


def hidden_at_scored(
    forward: Callable[..., torch.Tensor], ids: torch.Tensor, mask: torch.Tensor | None, scored: torch.Tensor
) -> torch.Tensor:
    """`forward(ids, mask)` -> (B, L, H) at the flat positions `scored` (N,): (N, H)."""
    return forward(ids, mask).flatten(0, 1).index_select(0, scored)


def hidden_states_and_balance(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`last_hidden_states` and transformers' load-balancing loss (a scalar) of a mixture of experts."""
    base = base_of(model)
    states = []
    options = {"use_cache": False, "output_router_logits": True, "logits_to_keep": 1}
    with base.base_model.register_forward_hook(lambda module, args, output: states.append(output[0])):
        # `forward`, not the module, whose hooks already run around this call. One position of logits costs little.
        out = base.forward(input_ids=input_ids, attention_mask=attention_mask, **options)
    return states[0], out.aux_loss


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32, or in its own dtype if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _logit_scale(config) -> float:
    """The factor that an architecture applies to its logits. transformers' configs have several names for it."""
    if config.model_type == "mpt":  # has a logit_scale that it does not use
        return 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (scale := getattr(config, name, None)) is not None:
            return float(scale)
    scaling = float(getattr(config, "logits_scaling", None) or 1)  # Granite and MiniCPM3 divide by it
    return scaling if config.model_type == "hyperclovax" else 1.0 / scaling


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is an nn.Linear without adapter or packed weights; FSDP2 turns it into a subclass."""
    return type(module) is nn.Linear or type(module).__bases__ == (FSDPModule, nn.Linear)


@dataclass
class LogitHead:
    """Projects hidden states (n, H) to logits (n, V) as the model's forward does, scale and softcap included."""

    head: Callable[[torch.Tensor], torch.Tensor]  # a module; tests pass functions
    scale: float
    softcap: float | None  # cap of an architecture that computes cap · tanh(logits / cap)
    gathered: bool = False  # the hooks that gather sharded weights have run, and must not run again

    @classmethod
    def of(cls, model: nn.Module, gathered: bool = False) -> "LogitHead":
        base = base_of(model)
        config = base.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        return cls(base.get_output_embeddings(), _logit_scale(config), cap, gathered)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "LogitHead":
        """What `save` wrote, frozen, on a device."""
        with safe_open(path, "pt") as file:
            # A copy in memory of its own, whose alignment products on a CPU depend on.
            tensors = {name: file.get_tensor(name).to(device, copy=True) for name in file.keys()}  # noqa: SIM118
            values = {name: float(value) for name, value in file.metadata().items()}
        size, width = tensors["weight"].shape
        linear = nn.Linear(width, size, bias="bias" in tensors, device="meta", dtype=tensors["weight"].dtype)
        linear.load_state_dict(tensors, assign=True)
        return cls(linear.requires_grad_(False), values["scale"], values.get("softcap"))

    def check_plain(self) -> None:
        """Raises ValueError for a head that `save` can't write: with an adapter, packed, or not in memory."""
        if not is_plain_linear(self.head) or not self.head.weight.is_floating_point() or self.head.weight.is_meta:
            raise ValueError(
                f"The teacher's output head ({type(self.head).__name__}) is no plain linear layer in memory: it has an "
                "adapter, packed weights or weights elsewhere. Merge the adapter first, or keep the top k."
            )

    def save(self, path: Path, vocab_size: int) -> None:
        """Writes a plain linear head, cut to its first `vocab_size` ids, as safetensors: `weight` (V, H), `bias` (V,) if
        it has one, and as metadata `scale`, and `softcap` if it has one."""
        tensors = {name: p.detach()[:vocab_size].cpu().contiguous() for name, p in self.head.named_parameters()}
        values = {"scale": self.scale, "softcap": self.softcap}
        save_file(tensors, path, {name: repr(float(value)) for name, value in values.items() if value is not None})

    @property
    def linear(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weight (V, H) and bias (V,) or None of a plain linear head; None for a head with an adapter or hooks."""
        head = self.head
        if not is_plain_linear(head) or not head.weight.is_floating_point() or hasattr(head, "_hf_hook"):
            return None
        if not self.gathered and (head._forward_hooks or head._forward_pre_hooks):
            return None
        return head.weight, head.bias

    def raw(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's output, before scale and softcap."""
        weight = getattr(self.head, "weight", None)
        if weight is not None and weight.is_floating_point() and not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(weight.dtype)  # bf16 states before an fp32 head, or the reverse
        return self.head.forward(hidden) if self.gathered else self.head(hidden)

    def finish(self, raw: torch.Tensor) -> torch.Tensor:
        """Logits from `raw`."""
        if self.scale != 1.0:
            raw = widened(raw) * self.scale
        if self.softcap is not None:
            raw = self.softcap * torch.tanh(widened(raw) / self.softcap)
        return raw

    def to_raw(self, grad: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The chain rule through `finish`: d loss / d logits (n, V) -> d loss / d raw, in place."""
        if self.softcap is not None:
            grad.mul_(1 - (logits / self.softcap) ** 2)
        return grad.mul_(self.scale) if self.scale != 1.0 else grad

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.finish(self.raw(hidden))

    def trainable_params(self) -> tuple[nn.Parameter, ...]:
        return tuple(p for p in self.head.parameters() if p.requires_grad)


def probe_ids(model: nn.Module) -> torch.Tensor:
    """Eight tokens, (1, 8), on the model's device, for a test of its forward."""
    device = next(model.parameters()).device
    return torch.arange(4, 12, device=device)[None] % base_of(model).config.get_text_config().vocab_size


@torch.no_grad()
def check_projection(model: nn.Module, who: str) -> None:
    """Raises ValueError for a model that is not causal, or whose logits are not `LogitHead(last_hidden_states)`."""
    base, ids = base_of(model), probe_ids(model)
    mask = torch.ones_like(ids)
    what = f"The {who} ({type(base).__name__})"
    if base.base_model is base:
        raise ValueError(f"{what} has no body apart from its head: gkd cannot train this architecture yet.")
    other = torch.cat([ids[:, :4], ids[:, 4:].flip(1)], 1)  # another text with the same four first tokens
    with modes_kept(model):
        model.eval()
        calls = (model(input_ids=i, attention_mask=mask, use_cache=False) for i in (ids, other))
        logits, others = (out.logits.float() for out in calls)
        computed = LogitHead.of(model)(last_hidden_states(model, ids, mask)).float().to(logits.device)
    tolerance = 0.02 * logits.abs().max().item() + 1e-3
    if (logits[:, :4] - others[:, :4]).abs().max().item() > tolerance:
        raise ValueError(f"{what} sees tokens that are yet to come: gkd trains causal language models.")
    if (error := (logits - computed).abs().max().item()) > tolerance:
        raise ValueError(
            f"{what} does not compute its logits as head(hidden states): they differ by up to {error:.3g}. gkd cannot "
            "train this architecture yet."
        )
