"""A student from its teacher, by copying some of its layers."""

from torch import nn


def kept_layers(total: int, keep: int) -> list[int]:
    """`keep` of `total` layers at even distances, the first and the last included.

    Raises:
        ValueError: unless 2 <= keep <= total.
    """
    if not 2 <= keep <= total:
        raise ValueError(f"The teacher has {total} layers: keep between 2 and {total} of them, not {keep}.")
    return [round(i * (total - 1) / (keep - 1)) for i in range(keep)]


def layer_list(model: nn.Module) -> str:
    """The name of a model's list of layers.

    Raises:
        ValueError: the architecture has no single one.
    """
    total = model.config.get_text_config().num_hidden_layers
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    if len(lists) != 1:
        raise ValueError(f"{type(model).__name__} has {len(lists)} lists of {total} layers; can't tell which to thin.")
    return lists[0]


def shrink(model: nn.Module, keep: int) -> nn.Module:
    """Drops all but `keep` layers of a decoder-only transformers model, in place.

    Raises:
        ValueError: `keep` is out of range, or the architecture has no single list of layers.
    """
    config = model.config.get_text_config()
    total = config.num_hidden_layers
    name = layer_list(model)
    layers = model.get_submodule(name)
    indices = kept_layers(total, keep)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.ModuleList(layers[i] for i in indices))
    for position, layer in enumerate(getattr(model.get_submodule(parent), attribute)):
        for module in layer.modules():  # where a layer finds its keys and values in the cache
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    config.num_hidden_layers = keep
    for key, value in list(config.to_dict().items()):  # layer_types and the like: one entry a layer
        if isinstance(value, list) and len(value) == total:
            setattr(config, key, [value[i] for i in indices])
    return model
