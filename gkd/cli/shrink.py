"""Makes a student from its teacher by copying some of its layers, for those who have no small sibling of it.

    gkd shrink TEACHER -o student --layers 15

keeps 15 layers at even distances, the first and the last among them, with the teacher's embeddings, head, final norm
and tokenizer. Such a student knows the words but has lost the sentences: warm it up with supervised KD (--lmbda 0
--beta 0) before on-policy training, as the GKD paper does.
"""

import argparse

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from gkd.config.commands import shrink_flags
from gkd.io.errors import one_line_errors, refusals
from gkd.io.files import appearing
from gkd.io.paths import not_loaded
from gkd.io.pickles import check_weights
from gkd.models.loading import load_pretrained
from gkd.models.weights import rehearse


def kept_layers(total: int, keep: int) -> list[int]:
    """`keep` of `total` layers, at even distances, with both ends. Raises ValueError unless 2 <= keep <= total."""
    if not 2 <= keep <= total:
        raise ValueError(f"The teacher has {total} layers: keep between 2 and {total} of them, not {keep}.")
    return [round(i * (total - 1) / (keep - 1)) for i in range(keep)]


def layer_list(model: nn.Module) -> str:
    """The name of a model's list of layers. Raises ValueError if the architecture has no single one."""
    total = model.config.get_text_config().num_hidden_layers
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    if len(lists) != 1:
        raise ValueError(f"{type(model).__name__} has {len(lists)} lists of {total} layers; can't tell which to thin.")
    return lists[0]


def shrink(model: nn.Module, keep: int) -> nn.Module:
    """Drops all but `keep` layers of a decoder, in place. Raises ValueError as `layer_list` and `kept_layers` do."""
    config = model.config.get_text_config()
    total = config.num_hidden_layers
    name = layer_list(model)
    indices = kept_layers(total, keep)
    layers = nn.ModuleList(model.get_submodule(name)[i] for i in indices)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layers)
    for position, layer in enumerate(layers):
        for module in layer.modules():  # the index by which a layer finds its keys and values in the cache
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    config.num_hidden_layers = keep
    for key, value in list(config.to_dict().items()):  # layer_types and the like: one entry a layer
        if isinstance(value, list) and len(value) == total:
            setattr(config, key, [value[i] for i in indices])
    return model


def main(argv: list[str] | None = None, prog: str = "gkd shrink") -> None:
    with one_line_errors(prog, "The same command starts again."), torch.inference_mode():
        shrink_teacher(shrink_flags(argv, __doc__, prog), prog)


def shrink_teacher(args: argparse.Namespace, prog: str) -> None:
    with refusals(prog, Exception):  # the tokenizers library raises bare exceptions
        check_weights(args.teacher)
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.teacher, trust_remote_code=False)
            config = AutoConfig.from_pretrained(args.teacher, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(not_loaded("TEACHER", args.teacher, error)) from error
        total = config.get_text_config().num_hidden_layers
        keep = total // 2 if args.layers is None else args.layers
        kept_layers(total, keep)  # bad input is reported before the weights are read
        if (skeleton := rehearse(args.teacher, {"trust_remote_code": False})) is not None:
            layer_list(skeleton)
        model = load_pretrained(args.teacher, dtype="auto")
        before = sum(p.numel() for p in model.parameters())
        shrink(model, keep)
    with appearing(args.output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    after = sum(p.numel() for p in model.parameters())
    print(f"{args.output_dir}: {keep} layers, {after / 1e6:.0f}M of the teacher's {before / 1e6:.0f}M parameters.")
