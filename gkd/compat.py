"""Everything that gkd uses of TRL beyond its documented API; `tests/test_compat.py` fails if TRL changes any of it."""

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from packaging.version import Version
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer
from trl.models.utils import _ForwardRedirection
from trl.models.utils import prepare_deepspeed as prepare_deepspeed
from trl.models.utils import unwrap_model_for_generation as unwrap_model_for_generation
from trl.trainer.utils import maybe_gather_lm_head_ctx

from gkd.io.replaced import replaced

# The newest minor versions that the tests pass with. Both libraries may change internals that gkd uses.
NEWEST = {"trl": "1.16", "peft": "0.21"}

for _name, _newest in NEWEST.items():
    if Version(version(_name)).release[:2] > Version(_newest).release and os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(
            f"{_name} {version(_name)} is newer than {_newest}, the newest that gkd is tested with. If something "
            f"breaks, pip install '{_name}=={_newest}.*' is known to work.",
            stacklevel=2,
        )

try:
    from trl.experimental.gkd import GKDConfig
    from trl.experimental.gkd import GKDTrainer as StockGKDTrainer
except ImportError:  # TRL may drop experimental trainers at any time
    # Training needs only SFTTrainer and these fields. The static methods of TRL's GKDTrainer are missing then.
    StockGKDTrainer = SFTTrainer

    @dataclass
    class GKDConfig(SFTConfig):
        """The fields and defaults of TRL's GKDConfig."""

        _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

        temperature: float = field(default=0.9, metadata={"help": "Temperature of sampling."})
        lmbda: float = field(default=0.5, metadata={"help": "Share of steps on the student's own text."})
        beta: float = field(default=0.5, metadata={"help": "Of the divergence: 0 forward KL, 1 reverse KL."})
        max_new_tokens: int = field(default=128, metadata={"help": "At most so many tokens a completion."})
        teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "The teacher."})
        teacher_model_init_kwargs: dict[str, Any] | str | None = field(
            default=None, metadata={"help": "JSON with arguments of `from_pretrained` for the teacher."}
        )
        disable_dropout: bool = field(default=True, metadata={"help": "Train without the student's dropout."})
        seq_kd: bool = field(default=False, metadata={"help": "Train on text that the teacher writes."})


# Runs a function inside a wrapper's forward, so that DDP, DeepSpeed and FSDP track the parameters that it uses:
# run_inside_forward(wrapped_model, unwrapped_model, function, *args).
run_inside_forward = _ForwardRedirection()


@contextmanager
def head_adapter_hidden(base: PreTrainedModel) -> Iterator[None]:
    """Hides a LoRA adapter on the output head from `SFTTrainer.__init__`, which refuses one.

    SFTTrainer's loss reads `lm_head.weight` and would leave the adapter untrained. Ours calls the head as a module
    (gkd.models.heads.LogitHead).
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
    """Undoes the changes of `SFTTrainer.__init__` to the config of a mixture of experts.

    With `output_router_logits` on, transformers' generation fails, also for users of the saved student. Our forward
    requests the router's logits itself.
    """
    config = base.config.get_text_config()
    names = ("output_router_logits", "router_aux_loss_coef")
    before = {name: getattr(config, name) for name in names if hasattr(config, name)}
    try:
        yield
    finally:
        config.update(before)


def forward_kept(args: GKDConfig) -> AbstractContextManager:
    """Keeps `SFTTrainer.__init__` from replacing the student's forward, as TRL before 1.15 does for its own loss."""
    return replaced(args, "loss_type", "nll")


def set_checkpointing_kwargs(args: GKDConfig, **defaults) -> None:
    """Sets `defaults` for `torch.utils.checkpoint.checkpoint`, which the user's and TRL's settings override.

    Newer versions of transformers read `activation_checkpointing_kwargs`; TRL writes the old name.
    """
    names = [n for n in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs") if hasattr(args, n)]
    for name in names:
        defaults |= getattr(args, name) or {}
    for name in names:
        setattr(args, name, dict(defaults) or None)


def gathered_zero3(head: nn.Module) -> AbstractContextManager:
    """Under ZeRO-3, gathers a head's parameters on every rank for the duration of the context."""
    return maybe_gather_lm_head_ctx(*head.parameters())
