"""Dropout and other randomness of a forward in training mode: detected, and turned off in the base model."""

from collections.abc import Collection, Iterator

import torch
from accelerate.logging import get_logger
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from gkd.generation.sampling import random_states, sampling_noise
from gkd.models.heads import last_hidden_states, modes_kept, probe_ids

logger = get_logger(__name__)


def _adapter_modules(model: nn.Module) -> set[nn.Module]:
    """The modules that adapters add to a model."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    added = (child for layer in layers for name, child in layer.named_children() if name != "base_layer")
    return {module for child in added for module in child.modules()}


def _rates(module: nn.Module, *words: str) -> Iterator[str]:
    """Names of the module's rates above 0 that contain one of `words`; the p of nn.Dropout counts too."""
    for name, value in vars(module).items():
        named = any(word in name for word in words) or (name == "p" and isinstance(module, _DropoutNd))
        if named and isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
            yield name


def disable_base_dropout(model: nn.Module) -> None:
    """Sets the dropout rates of the model to 0, except those of adapters.

    The divergence can't fall below the noise that dropout adds to one of its two distributions. LoRA's dropout
    regularises the adapter and is the user's choice.
    """
    adapters = _adapter_modules(model)
    for module in model.modules():
        if module not in adapters:
            for name in list(_rates(module, "drop")):
                setattr(module, name, 0.0)


def has_dropout(model: nn.Module, evaluating: Collection[nn.Module] = ()) -> bool:
    """Whether a module has a rate of dropout or of a router's noise; looks at names, without a forward."""
    return any(any(_rates(m, "drop", "jitter")) for m in model.modules() if m not in evaluating)


@torch.no_grad()
def random_modules(
    model: nn.Module, evaluating: Collection[nn.Module] = (), seed: int = 0
) -> tuple[list[nn.Module], torch.Tensor]:
    """Runs a few tokens in training mode, and compares the random state whenever a module starts or ends.

    Returns:
        The modules that draw random numbers themselves, and the last hidden states. `evaluating` stay in evaluation mode.
    """
    ids = probe_ids(model)
    running: list[nn.Module] = []
    drawing: dict[nn.Module, None] = {}  # in order
    with sampling_noise(seed, ids.device):
        states = random_states(ids.device)

        def compare_states() -> None:
            nonlocal states
            before, states = states, random_states(ids.device)
            if running and not all(map(torch.equal, before, states)):
                drawing[running[-1]] = None

        def enter(module, args):
            compare_states()
            running.append(module)

        def leave(module, args, output):
            compare_states()
            running.pop()

        with modes_kept(model):
            model.train()
            for module in evaluating:
                module.training = False
            with register_module_forward_pre_hook(enter), register_module_forward_hook(leave):
                hidden = last_hidden_states(model, ids, torch.ones_like(ids))
    return list(drawing), hidden


def settle_dropout(
    model: nn.Module, disable: bool, checkpointed: bool, callable_alone: bool
) -> tuple[bool, list[nn.Module]]:
    """After `disable_base_dropout`: detects what is still random, such as noise in a router.

    Args:
        disable: the base model must draw nothing.
        checkpointed: its layers use gradient checkpointing, which needs training mode.
        callable_alone: a forward tells; names of rates do if weights are sharded.

    Returns:
        Whether a forward in training mode draws random numbers, and the modules that have to be in evaluation mode.
    """
    if not callable_alone:
        evaluating = [m for m in model.modules() if any(_rates(m, "jitter"))] if disable else []
        return has_dropout(model, evaluating), evaluating
    drawing, hidden = random_modules(model)
    adapters = _adapter_modules(model)
    base = [module for module in drawing if module not in adapters]
    if not (disable and base):
        return bool(drawing), []
    evaluating = [m for m in base if not (checkpointed and hasattr(m, "gradient_checkpointing"))]
    drawing, hidden = random_modules(model, evaluating)
    names = sorted({type(module).__name__ for module in drawing if module in base})
    if names and not hidden.equal(random_modules(model, evaluating, seed=1)[1]):  # some draw to no effect
        logger.warning(f"Dropout that can't be turned off stays on in {', '.join(names)}: the gradient is noisier.")
    return bool(drawing), evaluating
