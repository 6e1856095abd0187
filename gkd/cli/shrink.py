"""Makes a student of its teacher by leaving out layers, for those who have no small sibling of it.

    gkd shrink TEACHER
    gkd shrink TEACHER -o student --layers 26

The first command prints how far from the teacher a student is for each number of layers that it may keep, so that you can
choose; the second makes the student, with the teacher's embeddings, head, final norm and tokenizer. Layers are chosen by
the forward KL of the teacher's distribution to that without them, on the teacher's own greedy answers to a few prompts:
the best block of layers that stand together, or one layer after another, whichever is nearer. Such a student has lost
some of its sentences: warm it up with supervised KD (--lmbda 0 --beta 0) before on-policy training, as the GKD paper does.
"""

import argparse
from typing import Any

import torch
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from gkd.config.commands import shrink_flags
from gkd.data.batch import GKDCollator, training_batch
from gkd.data.encoding import RowEncoder
from gkd.data.loading import check_rows, load_rows
from gkd.generation.generator import CompletionGenerator
from gkd.io.console import print_table
from gkd.io.errors import one_line_errors, refusals
from gkd.io.files import appearing
from gkd.io.paths import not_loaded
from gkd.io.pickles import check_weights
from gkd.models.heads import probe_ids
from gkd.models.loading import freeze, load_pretrained, read_configs
from gkd.models.shrink import Cut, CutDivergence, check_layers, count_cuts, layer_list, search_cuts, shrink
from gkd.models.tokenizers import stop_token_ids
from gkd.models.weights import rehearse

ROWS, ANSWER = 6, 24  # prompts, and tokens of an answer
# As everyday as what people ask; none of them stands in data/.
PROMPTS = (
    "Why does bread rise in the oven?",
    "Write a short message to a neighbour whose parcel you have taken in.",
    "What is 17 + 25?",
    "Name three animals that sleep in winter.",
    "Translate to French: The shop closes at six.",
    "How do I sort a list in Python?",
)


def main(argv: list[str] | None = None, prog: str = "gkd shrink") -> None:
    with one_line_errors(prog, "The same command starts again."), torch.inference_mode():
        shrink_teacher(shrink_flags(argv, __doc__, prog), prog)


def shrink_teacher(args: argparse.Namespace, prog: str) -> None:
    with refusals(prog, Exception):  # the tokenizers library raises bare exceptions
        check_weights(args.teacher)
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.teacher, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(not_loaded("TEACHER", args.teacher, error)) from error
        configs = read_configs("TEACHER", args.teacher, trust_remote_code=False)
        total = configs[0].get_text_config().num_hidden_layers
        keep = max(2, total - total // 3) if args.layers is None else args.layers
        check_layers(total, keep)
        stop_ids = stop_token_ids(tokenizer, *configs)
        rows = encoded_prompts(args.prompts, tokenizer, stop_ids)
        if (skeleton := rehearse(args.teacher, {"trust_remote_code": False})) is not None:
            layer_list(skeleton)
        cuts = {}
        if keep < total:
            cuts = measured_cuts(args, rows, stop_ids, tokenizer.pad_token_id or stop_ids[0], keep)
        if args.layers is None:
            return
        model = load_pretrained(args.teacher, dtype="auto")
        before = sum(p.numel() for p in model.parameters())
        shrink(model, cuts[keep].kept if cuts else range(total))
    with appearing(args.output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with refusals(prog):
            check_written(model, str(folder))
    after = sum(p.numel() for p in model.parameters())
    print(f"{args.output_dir}: {keep} layers, {after / 1e6:.0f}M of the teacher's {before / 1e6:.0f}M parameters.")


def encoded_prompts(file: str | None, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> list[dict[str, Any]]:
    """The first prompts of a file, or the built-in ones, encoded as `gkd train` does. Raises DataError for a bad row."""
    encoder = RowEncoder(tokenizer, 512, ANSWER, "last_turn", stop_ids)
    if file is None:
        chat = tokenizer.chat_template is not None
        return [encoder({"prompt": [{"role": "user", "content": text}] if chat else text}) for text in PROMPTS]
    rows = load_rows(file, "train")
    check_rows(rows, file, needs_answers=False)
    encoder.source = file
    return [encoder(row, index) for index, row in enumerate(rows.take(min(ROWS, len(rows))))]


def measured_cuts(
    args: argparse.Namespace, rows: list[dict[str, Any]], stop_ids: list[int], pad: int, keep: int
) -> dict[int, Cut]:
    """The best cuts down to `keep` layers, printed as a table; in fp32, since bf16 rounds away small differences."""
    model = freeze(load_pretrained(args.teacher, dtype="float32"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    total = model.config.get_text_config().num_hidden_layers
    blocks_at = range(keep, total) if args.layers is None else [keep]
    with tqdm(total=count_cuts(total, keep, blocks_at), unit="cut") as bar:

        def tell(phase: str) -> None:
            bar.set_description(phase)
            bar.update()

        bar.set_description("the teacher answers")
        collated = GKDCollator(pad)(rows)
        prompts = collated["prompts"].to(device), collated["prompt_attention_mask"].to(device)
        greedy = GenerationConfig(max_new_tokens=ANSWER, do_sample=False, pad_token_id=pad, eos_token_id=stop_ids)
        text = training_batch(*prompts, *CompletionGenerator("dynamic")(model, *prompts, greedy), pad)
        cuts = search_cuts(CutDivergence(model, text.input_ids, text.scored), keep, blocks_at, tell)

    layers = model.get_submodule(layer_list(model))
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    whole = sum(p.numel() for p in model.parameters())
    table = Table(title="What is left without layers", caption="Forward KL to the teacher, in nats per token.")
    for title in ("layers kept", "of the parameters", "forward KL"):
        table.add_column(title, justify="right")
    table.add_column("chosen")
    table.add_column("left out (the first layer is 0)")
    for size, cut in sorted(cuts.items(), reverse=True):
        out = sorted(set(range(total)) - set(cut.kept))
        share = 1 - sum(sizes[i] for i in out) / whole
        table.add_row(str(size), f"{share:.0%}", f"{cut.divergence:.3f}", cut.way, ", ".join(map(str, out)))
    print_table(table)
    return cuts


def check_written(model: nn.Module, folder: str) -> None:
    """Raises ValueError if the student in `folder` does not compute what `model` does.

    In some architectures the kind of a layer follows from its position, which has changed.
    """
    ids = probe_ids(model)
    try:
        models = model.eval(), load_pretrained(folder, dtype="auto").eval()
        logits, read = (m(ids, use_cache=False).logits.float() for m in models)
        same = bool((logits - read).abs().max() <= 0.01 * logits.abs().max())
    except ValueError:  # weights of other names or shapes
        same = False
    if not same:
        kept = model.config.get_text_config().num_hidden_layers
        raise ValueError(
            f"{type(model).__name__}: with {kept} layers its config says other kinds of layers than those that are kept, "
            "since it counts them by position. Try another --layers."
        )
