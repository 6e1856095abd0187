"""Weights sharded over ranks by FSDP2 or ZeRO-3: shards the teacher, and gathers a head."""

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
from gkd.io.replaced import replaced


def check_fsdp(accelerator: Accelerator) -> None:
    """Adapts accelerate's FSDP settings to a student whose wrapper returns the loss.

    Raises ValueError for FSDP1, whose flat parameters are unusable outside of their module's forward.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP1 is not supported: set fsdp_version: 2, as ds_configs/fsdp2.yaml does.")
    if plugin.mixed_precision_policy is not None:  # with --bf16, accelerate would round the returned loss to bf16
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def prepare_fsdp2(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shards a frozen model layer by layer, in place; TRL's prepare_fsdp would gather all of it at once."""
    plugin = accelerator.state.fsdp_plugin
    # accelerate stores the first model's layer class in the plugin, and would search the student for it too.
    with (
        replaced(plugin, "auto_wrap_policy", plugin.auto_wrap_policy),
        replaced(plugin, "transformer_cls_names_to_wrap", None),
    ):
        return fsdp2_prepare_model(accelerator, model).eval()


def shard_layers(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shards a frozen model in place over all ranks, beside a student whose weights are whole.

    Each decoder layer and the head are units, gathered for their forward and freed after it. Embedding and last norm,
    and a head that shares the embedding's weight, belong to the root unit. Raises ValueError if transformers does not
    know the model's decoder layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"--teacher_sharded: {type(model).__name__} has no decoder layers that transformers knows.")
    head = model.get_output_embeddings()
    head_unit = [head] if head.weight is not model.get_input_embeddings().weight else []
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in [*reversed(layers), *head_unit, model]:  # inner ones first; each moves to the device alone
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model.eval()


@contextmanager
def gathered_head(model: nn.Module, head: nn.Module, zero3: bool) -> Iterator[None]:
    """Gathers all parameters of a sharded frozen model's head on every rank. Collective: all ranks enter together.

    For a model that trains, which needs its head in the backward pass too, run the code inside its forward instead.
    """
    if zero3:
        with gathered_zero3(head):
            yield
        return
    # FSDP2: the head is a unit, alone or with the final norm; in older versions of accelerate it belongs to the root.
    unit = head if isinstance(head, FSDPModule) else model
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()
