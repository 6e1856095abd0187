"""Makes a student from its teacher by copying some of its layers, for those who have no small sibling of it.

    gkd shrink TEACHER -o student --layers 15

keeps 15 layers at even distances, the first and the last among them, with the teacher's embeddings, head, final norm
and tokenizer. Such a student knows the words but has lost the sentences: warm it up with supervised KD (--lmbda 0
--beta 0) before on-policy training, as the GKD paper does.
"""

import argparse

import torch
from transformers import AutoConfig, AutoTokenizer

from gkd.config.commands import shrink_flags
from gkd.io.errors import one_line_errors, refusals
from gkd.io.files import appearing
from gkd.io.paths import not_loaded
from gkd.io.pickles import check_weights
from gkd.models.loading import load_pretrained
from gkd.models.shrink import kept_layers, layer_list, shrink
from gkd.models.weights import rehearse


def main(argv: list[str] | None = None, prog: str = "gkd shrink") -> None:
    with one_line_errors(prog, "The same command starts again."), torch.inference_mode():
        shrink_teacher(shrink_flags(argv, __doc__, prog), prog)


def shrink_teacher(args: argparse.Namespace, prog: str) -> None:
    out = args.output_dir
    # All that can be wrong is told before the weights are read. The tokenizers library raises bare exceptions.
    with refusals(prog, Exception):
        check_weights(args.teacher)
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.teacher, trust_remote_code=False)
            config = AutoConfig.from_pretrained(args.teacher, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(not_loaded("TEACHER", args.teacher, error)) from error
        total = config.get_text_config().num_hidden_layers
        keep = total // 2 if args.layers is None else args.layers
        kept_layers(total, keep)
        if (built := rehearse(args.teacher, {"trust_remote_code": False})) is not None:
            layer_list(built)
        model = load_pretrained(args.teacher, dtype="auto")
        before = sum(p.numel() for p in model.parameters())
        shrink(model, keep)
    with appearing(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    after = sum(p.numel() for p in model.parameters())
    print(f"{out}: {keep} layers, {after / 1e6:.0f}M of the teacher's {before / 1e6:.0f}M parameters.")
