"""Weights sharded over ranks by FSDP2 or ZeRO-3: shards the teacher, and gathers a head."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from gkd.compat import gathered_zero3
from gkd.io.replaced import replaced
from gkd.models.loading import size_of


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


def ranks_of_machine(ranks: int) -> int:
    """How many of all `ranks` the launcher has started on this machine; all if it does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


def ranks_that_share(size: float, ranks: int, local: int, memory: float) -> int:
    """Over how many ranks a frozen model is sharded: those of a machine if it takes at most a quarter of their memory, else all.

    Within a machine its layers are gathered over NVLink, between machines over a network that is many times slower.

    Args:
        size, memory: bytes of the model and of a GPU.
        ranks, local: of all machines and of each; 0 `local` if they differ.
    """
    return local if 1 < local < ranks and ranks % local == 0 and size / local <= memory / 4 else ranks


def shard_layers(model: nn.Module, accelerator: Accelerator, memory: float) -> nn.Module:
    """Shards a frozen model in place over the ranks of each machine, or over all, beside a student whose weights are whole.

    Each decoder layer and the head are units, gathered for their forward and freed after it. Embedding and last norm,
    and a head that shares the embedding's weight, belong to the root unit. `memory`: bytes of this rank's GPU. Raises
    ValueError if transformers does not know the model's decoder layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"--teacher_sharded: {type(model).__name__} has no decoder layers that transformers knows.")
    head = model.get_output_embeddings()
    head_unit = [head] if head.weight is not model.get_input_embeddings().weight else []
    ranks = accelerator.num_processes
    own = torch.tensor([[ranks_of_machine(ranks), memory]], dtype=torch.float64, device=accelerator.device)
    locals_, memories = accelerator.gather(own).T.tolist()  # which decide on all ranks alike
    local = int(locals_[0]) if len(set(locals_)) == 1 else 0
    sharing = ranks_that_share(size_of(model)[1], ranks, local, min(memories))
    mesh = init_device_mesh(accelerator.device.type, (ranks // sharing, sharing), mesh_dim_names=("copy", "shard"))
    mesh = mesh["shard"]
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
