"""Makes a student from its teacher by copying some of its layers, for those who have no small sibling of it.

    python -m gkd.cli.shrink TEACHER -o student --layers 15

keeps 15 layers at even distances, the first and the last among them, with the teacher's embeddings, head, final norm
and tokenizer. Such a student knows the words but has lost the sentences: warm it up with supervised KD (--lmbda 0
--beta 0) before on-policy training, as the GKD paper does.
"""

import sys

from gkd.cli.start import quiet_imports
from gkd.config.commands import shrink_flags

if __name__ == "__main__":  # help and wrong flags are answered before the imports below, which take seconds
    quiet_imports("gkd.cli.shrink")
    shrink_flags(sys.argv[1:], __doc__)

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


@one_line_errors("gkd.cli.shrink", "The same command starts again.")
def main(argv: list[str] | None = None) -> None:
    args = shrink_flags(argv, __doc__)
    out = args.output_dir
    # All that can be wrong is told before the weights are read. The tokenizers library raises bare exceptions.
    with refusals("gkd.cli.shrink", Exception):
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


if __name__ == "__main__":
    with torch.inference_mode():
        main()
