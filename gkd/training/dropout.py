"""What makes a forward in training mode random: found, and turned off in the base model."""

from collections.abc import Collection, Iterator

import torch
from accelerate.logging import get_logger
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from gkd.generation.sampling import random_states, sampling_noise
from gkd.models.heads import last_hidden_states, probe_ids

logger = get_logger(__name__)


def _adapter_modules(model: nn.Module) -> set[nn.Module]:
    """What adapters add to a model: their dropout is theirs."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    added = (child for layer in layers for name, child in layer.named_children() if name != "base_layer")
    return {module for child in added for module in child.modules()}


def _rates(module: nn.Module, *words: str) -> Iterator[str]:
    """Names of the module's rates, above 0, with one of `words` in the name; the p of nn.Dropout always counts."""
    for name, value in vars(module).items():
        named = any(word in name for word in words) or (name == "p" and isinstance(module, _DropoutNd))
        if named and isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
            yield name


def disable_base_dropout(model: nn.Module) -> None:
    """Sets the dropout rates of the model itself to 0, and leaves those of an adapter as they were asked for.

    The divergence compares two distributions; noise on one of them is a floor that it can't get below. LoRA's dropout
    regularises the adapter and is the user's choice.
    """
    kept = _adapter_modules(model)
    for module in model.modules():
        if module not in kept:
            for name in list(_rates(module, "drop")):
                setattr(module, name, 0.0)


def has_dropout(model: nn.Module, evaluating: Collection[nn.Module] = ()) -> list[nn.Module]:
    """The modules with a rate of dropout, or of a router's noise: what can be told without a forward."""
    return [m for m in model.modules() if m not in evaluating and any(_rates(m, "drop", "jitter"))]


@torch.no_grad()
def random_modules(
    model: nn.Module, evaluating: Collection[nn.Module] = (), seed: int = 0
) -> tuple[list[nn.Module], torch.Tensor]:
    """Runs a few tokens in training mode, and looks at the random state whenever a module starts or ends.

    Args:
        evaluating: modules that stay in evaluation mode.

    Returns:
        The modules that drew random numbers themselves, and the last hidden states.
    """
    ids = probe_ids(model)
    running: list[nn.Module] = []
    drew: dict[nn.Module, None] = {}
    modes = [(module, module.training) for module in model.modules()]
    with sampling_noise(seed, ids.device):
        states = random_states(ids.device)

        def look() -> None:
            nonlocal states
            before, states = states, random_states(ids.device)
            if running and not all(map(torch.equal, before, states)):
                drew[running[-1]] = None

        def enter(module, args):
            look()
            running.append(module)

        def leave(module, args, output):
            look()
            running.pop()

        try:
            model.train()
            for module in evaluating:
                module.training = False
            with register_module_forward_pre_hook(enter), register_module_forward_hook(leave):
                hidden = last_hidden_states(model, ids, torch.ones_like(ids))
        finally:
            for module, training in modes:
                module.training = training
    return list(drew), hidden


def settle_dropout(
    model: nn.Module, disable: bool, checkpointed: bool, callable_alone: bool
) -> tuple[bool, list[nn.Module]]:
    """After `disable_base_dropout`: what still makes training random, such as noise in a router, is found by a forward.

    Args:
        disable: the base model is to draw nothing.
        checkpointed: its layers are, which they are in training mode alone.
        callable_alone: False where weights are sharded; then names tell.

    Returns:
        Whether a forward in training mode draws random numbers, and the modules that have to be in evaluation mode.
    """
    if not callable_alone:
        evaluating = [m for m in model.modules() if any(_rates(m, "jitter"))] if disable else []
        return bool(has_dropout(model, evaluating)), evaluating
    drawing, hidden = random_modules(model)
    base = [module for module in drawing if module not in _adapter_modules(model)]
    if not (disable and base):
        return bool(drawing), []
    evaluating = [m for m in base if not (checkpointed and hasattr(m, "gradient_checkpointing"))]
    drawing, hidden = random_modules(model, evaluating)
    left = sorted({type(module).__name__ for module in drawing if module in base})
    if left and not hidden.equal(random_modules(model, evaluating, seed=1)[1]):  # some draw to no effect
        logger.warning(f"Dropout that can't be turned off stays on in {', '.join(left)}: the gradient is noisier.")
    return bool(drawing), evaluating
