"""A decoder whose MLPs have fewer channels: those that its own text moves least are left out.

As in Minitron (arXiv 2407.14679), a few prompts tell: a channel counts as much as it adds to what the MLP writes, the root
mean square of its activation times the norm of its column of the output projection.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

_STEP = 16  # channels stay a multiple of it, by which matrix products are fast


def gated_mlps(model: nn.Module) -> list[nn.Module]:
    """The MLP of each layer: silu(gate) * up, or the like, and a projection of that.

    Raises:
        ValueError: the layers have others, such as experts.
    """
    config = model.config.get_text_config()
    names = "gate_proj", "up_proj", "down_proj"
    mlps = [m for m in model.modules() if all(isinstance(getattr(m, name, None), nn.Linear) for name in names)]
    size = getattr(config, "intermediate_size", None)
    if len(mlps) != config.num_hidden_layers or any(mlp.down_proj.in_features != size for mlp in mlps):
        raise ValueError(
            f"{type(model).__name__} has no gated MLP of one size in each layer, which --width makes narrower: use --layers."
        )
    return mlps


def channels_of(share: float, total: int) -> int:
    """How many of `total` channels a share of them is."""
    return max(_STEP, round(share * total / _STEP) * _STEP)


@torch.no_grad()
def channel_scores(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """What each channel (I,) of each layer's MLP counts for the text `ids` (B, L) with `mask`, in fp32."""
    scores = []
    kept = mask.bool()

    def measure(module: nn.Linear, args: tuple) -> None:
        scores.append(args[0][kept].float().square().mean(0).sqrt() * module.weight.float().norm(dim=0))

    with ExitStack() as stack:
        for mlp in gated_mlps(model):
            stack.callback(mlp.down_proj.register_forward_pre_hook(measure).remove)
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return scores


def best_channels(scores: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """The indices (count,) of the channels that count most, in each layer, in their order."""
    return [score.topk(count).indices.sort().values for score in scores]


@contextmanager
def only_channels(model: nn.Module, channels: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, the model computes as if its MLPs had these channels alone."""
    with ExitStack() as stack:
        for mlp, kept in zip(gated_mlps(model), channels, strict=True):
            share = torch.zeros(mlp.down_proj.in_features, device=kept.device).index_fill(0, kept, 1.0)
            hook = mlp.down_proj.register_forward_pre_hook(lambda _, args, share=share: (args[0] * share.to(args[0]),))
            stack.callback(hook.remove)
        yield


@torch.no_grad()
def narrow(model: nn.Module, channels: Sequence[torch.Tensor]) -> nn.Module:
    """Drops all channels but these (n,) of each layer's MLP, in place."""
    for mlp, kept in zip(gated_mlps(model), channels, strict=True):
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            old = getattr(mlp, name)
            weight = old.weight.index_select(dim, kept.to(old.weight.device))
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=old.bias is not None, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
            if old.bias is not None:
                linear.bias = old.bias if dim else nn.Parameter(old.bias[kept.to(old.bias.device)])
            setattr(mlp, name, linear)
        if hasattr(mlp, "intermediate_size"):
            mlp.intermediate_size = len(kept)
    model.config.get_text_config().intermediate_size = len(channels[0])
    return model
