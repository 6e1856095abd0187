"""Models whose weights are sharded over the ranks, by FSDP2 or ZeRO-3: sharding the teacher, gathering a head."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from gkd.compat import gathered_zero3


def check_fsdp(accelerator: Accelerator) -> None:
    """Readies accelerate's FSDP settings for the loss, which is what the student's wrapper returns.

    Raises:
        ValueError: FSDP1, whose flat parameters can't be used outside of their module's forward.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP1 is not supported: set fsdp_version: 2, as ds_configs/fsdp2.yaml does.")
    if plugin.mixed_precision_policy is not None:  # with --bf16 accelerate would round the loss and its sums to bf16
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def prepare_fsdp2(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shards a frozen model layer by layer, in place. (TRL's prepare_fsdp gathers all of it at once.)"""
    plugin = accelerator.state.fsdp_plugin
    # accelerate notes the first model's layer class there, and would look for it in the student too.
    kept = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    plugin.transformer_cls_names_to_wrap = None
    try:
        return fsdp2_prepare_model(accelerator, model).eval()
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = kept


def shard_layers(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shards a frozen model in place over all ranks, beside a student whose weights are whole.

    Each decoder layer and the head is a unit that is gathered for its forward and let go after it; embedding and last
    norm (and a head that shares the embedding's weight) are the root's.

    Raises:
        ValueError: the model's decoder layers can't be told.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"--teacher_sharded: {type(model).__name__} has no decoder layers that transformers knows.")
    head = model.get_output_embeddings()
    own = [head] if head.weight is not model.get_input_embeddings().weight else []
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in [*reversed(layers), *own, model]:  # inner ones first; each goes to the device by itself
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model.eval()


@contextmanager
def gathered_head(model: nn.Module, head: nn.Module, zero3: bool) -> Iterator[None]:
    """All parameters of a frozen model's head on every rank, where the model is sharded. All ranks enter it together.

    The head of a model that trains is needed in the backward pass too: run what uses it inside its forward instead.
    """
    if zero3:
        with gathered_zero3(head):
            yield
        return
    # FSDP2: accelerate makes the head a unit of its own, or one with the final norm; older versions leave it to the root.
    unit = next((m for m in (head, model) if isinstance(m, FSDPModule)), None)
    if unit is not None:
        unit.unshard()
    try:
        yield
    finally:
        if unit is not None:
            unit.reshard()
