"""Which layers of a decoder can be left out, by what that does to its distribution, and the decoder without them.

Layers that stand together often do the same work twice: ShortGPT (arXiv 2403.03853) ranks layers by how little they
change their input, and Minitron (arXiv 2407.14679) finds that a block left out costs less than layers here and there,
and that the divergence of the output says more than such a rank. So candidates are measured.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig

from gkd.models.heads import LogitHead, hidden_at_scored, last_hidden_states

# Config fields about layers by their position: how many of the first are of a kind, and which ones are.
_FIRST = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
_INDICES = ("mlp_only_layers", "attn_layer_indices", "full_attn_idxs")


@dataclass(frozen=True)
class Cut:
    """`kept` layers of a model, and the forward KL to it that they have, in nats a token."""

    kept: tuple[int, ...]
    divergence: float
    way: str  # that found it: "block" or "one by one"


def check_layers(total: int, keep: int) -> None:
    """Raises ValueError unless 2 <= keep <= total."""
    if not 2 <= keep <= total:
        raise ValueError(f"The teacher has {total} layers: keep between 2 and {total} of them, not {keep}.")


def layer_list(model: nn.Module) -> str:
    """The name of a model's list of layers. Raises ValueError if the architecture has no single one."""
    total = model.config.get_text_config().num_hidden_layers
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    if len(lists) != 1:
        raise ValueError(f"{type(model).__name__} has {len(lists)} lists of {total} layers; can't tell which to thin.")
    return lists[0]


def _set_layers(model: nn.Module, name: str, layers: Sequence[nn.Module]) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.ModuleList(layers))


def _set_config(config: PretrainedConfig, kept: Sequence[int]) -> None:
    """Makes a config that of its layers `kept`."""
    total = config.num_hidden_layers
    config.num_hidden_layers = len(kept)
    for key, value in list(config.to_dict().items()):
        if key in _INDICES and value is not None:
            setattr(config, key, [position for position, i in enumerate(kept) if i in value])
        elif isinstance(value, list) and len(value) == total:  # layer_types and the like: one entry a layer
            setattr(config, key, [value[i] for i in kept])
        elif key in _FIRST and value is not None:
            setattr(config, key, sum(i < value for i in kept))


def shrink(model: nn.Module, kept: Sequence[int]) -> nn.Module:
    """Drops all layers of a decoder but those at the indices `kept`, in place. Raises ValueError as `layer_list` does."""
    name = layer_list(model)
    layers = [model.get_submodule(name)[i] for i in kept]
    _set_layers(model, name, layers)
    for position, layer in enumerate(layers):
        for module in layer.modules():  # the index by which a layer finds its keys and values in the cache
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    _set_config(model.config.get_text_config(), kept)
    return model


class CutDivergence:
    """Measures the forward KL of a model's distribution to that of some of its layers, in fp32, nats a token.

    Layers before the first difference from the cut that it follows, at first the whole model, are not run again.

    Args:
        model: a causal language model in evaluation mode; each measurement leaves it as it was.
        ids: (B, L), padding on the right, on the model's device.
        scored: the flat positions (N,) that count.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor, scored: torch.Tensor):
        self.model, self.ids, self.scored = model, ids, scored
        self.name = layer_list(model)
        self.layers = list(model.get_submodule(self.name))
        self.head = LogitHead.of(model)
        self._followed: Sequence[int] = ()
        self._inputs: list[torch.Tensor] = []  # of each layer that is followed, (B, L, H)
        self.whole, self._inputs = self._run(range(len(self.layers)))
        self._followed = range(len(self.layers))

    def __call__(self, kept: Sequence[int]) -> float:
        return self._from_whole(self._run(kept)[0])

    @torch.no_grad()
    def of_now(self) -> float:
        """That of the model as it is now, whatever was changed."""
        return self._from_whole(self._log_probs())

    def _from_whole(self, log_probs: torch.Tensor) -> float:
        return F.kl_div(log_probs, self.whole, reduction="sum", log_target=True).item() / len(self.scored)

    def _log_probs(self) -> torch.Tensor:
        """(N, V) in fp32."""
        forward = partial(last_hidden_states, self.model)
        return self.head(hidden_at_scored(forward, self.ids, None, self.scored)).float().log_softmax(-1)

    def follow(self, kept: Sequence[int]) -> None:
        """Keeps the hidden states of this cut, for others that begin like it."""
        self._followed, self._inputs = kept, self._run(kept)[1]

    @torch.no_grad()
    def _run(self, kept: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Log-probabilities (N, V) of a cut, in fp32, and the input of each of its layers."""
        pairs = list(zip(kept, self._followed, strict=False))
        first = next((p for p, (a, b) in enumerate(pairs) if a != b), max(len(pairs) - 1, 0))
        inputs = self._inputs[: first + 1]
        with self._only(kept[first:], inputs, first):
            return self._log_probs(), inputs

    @contextmanager
    def _only(self, kept: Sequence[int], inputs: list[torch.Tensor], first: int) -> Iterator[None]:
        """The model is these layers meanwhile, the first of which reads `inputs[first]`; `inputs` gets those behind it."""

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if inputs[first:] and module is self.layers[kept[0]]:
                return (
                    ((inputs[first], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": inputs[first]})
                )
            inputs.append(args[0] if args else kwargs["hidden_states"])
            return None

        config = self.model.config.get_text_config()
        settings = dict(vars(config))
        hooks = [self.layers[i].register_forward_pre_hook(enter, with_kwargs=True) for i in kept]
        _set_layers(self.model, self.name, [self.layers[i] for i in kept])
        _set_config(config, kept)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            vars(config).clear()
            vars(config).update(settings)
            _set_layers(self.model, self.name, self.layers)


def blocks_left_out(total: int, out: int) -> list[tuple[int, ...]]:
    """What is kept of `total` layers if `out` that stand together are left out, for each place of them."""
    return [(*range(start), *range(start + out, total)) for start in range(total - out + 1)]


def one_left_out(kept: Sequence[int]) -> list[tuple[int, ...]]:
    """`kept` without one of them, for each of them."""
    return [tuple(i for i in kept if i != gone) for gone in kept]


def count_cuts(total: int, keep: int, blocks_at: Collection[int]) -> int:
    """How many cuts `search_cuts` measures."""
    return sum(range(keep + 1, total + 1)) + sum(keep_ + 1 for keep_ in blocks_at if keep_ < total - 1)


def search_cuts(
    divergence: CutDivergence, keep: int, blocks_at: Collection[int], tell: Callable[[str], None] = lambda phase: None
) -> dict[int, Cut]:
    """The best cut for each number of layers from one less than the model has down to `keep`.

    Layers are left out one by one, each time the one that costs least, and at the numbers `blocks_at` also as one
    block; the better is taken. `tell` is called with the phase before each measurement.
    """
    total = len(divergence.layers)
    best: dict[int, Cut] = {}

    def cheapest(cuts: list[tuple[int, ...]], way: str) -> Cut:
        measured = []
        for kept in cuts:
            tell(f"{way}, {len(kept)} of {total} layers")
            measured.append(Cut(kept, divergence(kept), way))
        return min(measured, key=lambda cut: cut.divergence)

    for size in blocks_at:
        if size < total - 1:  # a block of one layer is measured below
            best[size] = cheapest(blocks_left_out(total, total - size), "block")
    kept = tuple(range(total))
    for size in range(total - 1, keep - 1, -1):
        cut = cheapest(one_left_out(kept), "one by one")
        best[size] = min(cut, best.get(size, cut), key=lambda c: c.divergence)
        kept = cut.kept
        divergence.follow(kept)
    return best
