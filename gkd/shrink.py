"""Makes a student from its teacher by copying some of its layers, for those who have no small sibling of it.

    python -m gkd.shrink TEACHER -o student --layers 15

keeps 15 layers at even distances, the first and the last among them, with the teacher's embeddings, head, final norm
and tokenizer. Such a student knows the words but has lost the sentences: warm it up with supervised KD (--lmbda 0
--beta 0) before on-policy training, as the GKD paper does.
"""

import argparse
import os
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from gkd.fallback import one_line
from gkd.models import load_pretrained
from gkd.pickles import check_weights
from gkd.weight_checks import rehearse


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gkd.shrink", description=__doc__.split("\n")[0])
    parser.add_argument("teacher", help="name or folder of the teacher")
    parser.add_argument("-o", "--output_dir", required=True, help="folder of the student; must not exist")
    parser.add_argument("--layers", type=int, help="layers to keep (default: half)")
    args = parser.parse_args(argv)
    out = Path(args.output_dir)
    if out.exists():
        parser.error(f"{out} exists already.")
    try:  # all that can be wrong is told before the weights are read
        check_weights(args.teacher)
        tokenizer = AutoTokenizer.from_pretrained(args.teacher, trust_remote_code=False)
        config = AutoConfig.from_pretrained(args.teacher, trust_remote_code=False)
        total = config.get_text_config().num_hidden_layers
        keep = total // 2 if args.layers is None else args.layers
        kept_layers(total, keep)
        if (built := rehearse(args.teacher, {"trust_remote_code": False})) is not None:
            layer_list(built)
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        model = load_pretrained(args.teacher, dtype="auto")
        before = sum(p.numel() for p in model.parameters())
        shrink(model, keep)
    except Exception as error:  # the tokenizers library raises bare ones
        parser.error(one_line(error))
    temporary = out.with_name(out.name + ".partial")  # the folder appears whole or not at all
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, out)
    after = sum(p.numel() for p in model.parameters())
    print(f"{out}: {keep} layers, {after / 1e6:.0f}M of the teacher's {before / 1e6:.0f}M parameters.")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
