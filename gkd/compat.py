"""Everything that gkd uses of TRL beyond its documented API, in one place.

pyproject.toml pins TRL's minor version because of this list; `tests/test_trl_compat.py` says which line moved.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from trl import ModelConfig, ScriptArguments, SFTTrainer, TrlParser
from trl.experimental.gkd import GKDConfig
from trl.experimental.gkd import GKDTrainer as StockGKDTrainer
from trl.models.utils import _ForwardRedirection, prepare_deepspeed, unwrap_model_for_generation
from trl.trainer.utils import maybe_gather_lm_head_ctx

__all__ = [
    "GKDConfig",
    "ModelConfig",
    "SFTTrainer",
    "ScriptArguments",
    "StockGKDTrainer",
    "TrlParser",
    "gathered_zero3",
    "head_adapter_hidden",
    "moe_config_kept",
    "prepare_deepspeed",
    "run_inside_forward",
    "set_checkpointing_kwargs",
    "unwrap_model_for_generation",
]

# Runs a function inside a wrapper's forward, so that DDP, DeepSpeed and FSDP see the parameters it uses:
# run_inside_forward(wrapped_model, unwrapped_model, function, *args).
run_inside_forward = _ForwardRedirection()


@contextmanager
def head_adapter_hidden(base: PreTrainedModel) -> Iterator[None]:
    """Hides a LoRA adapter on the output head while `SFTTrainer.__init__` runs, which refuses one.

    SFTTrainer computes its loss from `lm_head.weight` and would leave the adapter untrained. Our loss calls the head
    as a module (gkd.models.heads.LogitHead), so the refusal does not apply to it.
    """
    head = base.get_output_embeddings()
    if not isinstance(head, BaseTunerLayer):
        yield
        return
    base.get_output_embeddings = head.get_base_layer
    try:
        yield
    finally:
        del base.get_output_embeddings


@contextmanager
def moe_config_kept(base: PreTrainedModel) -> Iterator[None]:
    """Restores what `SFTTrainer.__init__` writes into the config of a mixture of experts.

    With `output_router_logits` on, transformers' generation fails, also for whoever loads the saved student. Our
    forward asks for the router's logits where it needs them.
    """
    config = base.config.get_text_config()
    names = [name for name in ("output_router_logits", "router_aux_loss_coef") if hasattr(config, name)]
    values = [getattr(config, name) for name in names]
    try:
        yield
    finally:
        for name, value in zip(names, values, strict=True):
            setattr(config, name, value)


def set_checkpointing_kwargs(args: GKDConfig, **defaults) -> None:
    """`defaults` for `torch.utils.checkpoint.checkpoint`, under what the user and TRL have set.

    transformers reads `activation_checkpointing_kwargs` since it has that name, and TRL writes the old one.
    """
    names = [n for n in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs") if hasattr(args, n)]
    merged = defaults
    for name in names:
        merged = merged | (getattr(args, name) or {})
    for name in names:
        setattr(args, name, dict(merged) or None)


def gathered_zero3(head: nn.Module) -> AbstractContextManager:
    """All of a head's parameters on every rank under ZeRO-3, where each rank holds a part."""
    return maybe_gather_lm_head_ctx(*head.parameters())
