"""Makes a smaller student of its teacher, for those who have no small sibling of it.

    gkd shrink TEACHER
    gkd shrink TEACHER -o student --width 0.8
    gkd shrink TEACHER -o student --layers 26

The first command prints how far from the teacher a student is, so that you can choose: for each number of layers that it
may keep, and with narrower MLPs of as many parameters in all. The others make the student, with the teacher's embeddings,
head, final norm and tokenizer. What is left out is what the teacher's own greedy answers to a few prompts miss least: of
the layers, by the forward KL without them, the best block that stands together or one after another, whichever is nearer;
of the MLPs' channels, those that add least to what the MLP writes. Such a student has lost some of its sentences: warm it
up with supervised KD (--lmbda 0 --beta 0) before on-policy training, as the GKD paper does.
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from gkd.config.commands import shrink_flags
from gkd.data.batch import Batch, GKDCollator, training_batch
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
from gkd.models.narrow import best_channels, channel_scores, channels_of, gated_mlps, narrow, only_channels
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
        shows = args.layers is None and args.width is None
        keep = max(2, total - total // 3) if shows else args.layers or total
        check_layers(total, keep)
        stop_ids = stop_token_ids(tokenizer, *configs)
        rows = encoded_prompts(args.prompts, tokenizer, stop_ids)
        if (skeleton := rehearse(args.teacher, {"trust_remote_code": False})) is not None:
            layer_list(skeleton)
            if args.width is not None:
                gated_mlps(skeleton)
        kept, channels = range(total), None
        if keep < total or args.width is not None:
            kept, channels = measured(args, rows, stop_ids, tokenizer.pad_token_id or stop_ids[0], keep)
        if shows:
            return
        model = load_pretrained(args.teacher, dtype="auto")
        before = sum(p.numel() for p in model.parameters())
        shrink(model, kept)
        if channels is not None:
            narrow(model, channels)
    with appearing(args.output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with refusals(prog):
            check_written(model, str(folder))
    after = sum(p.numel() for p in model.parameters())
    narrower = "" if channels is None else f" with {len(channels[0])} MLP channels"
    share = f"{after / 1e6:.0f}M of the teacher's {before / 1e6:.0f}M parameters"
    print(f"{args.output_dir}: {keep} layers{narrower}, {share}.")


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


def measured(
    args: argparse.Namespace, rows: list[dict[str, Any]], stop_ids: list[int], pad: int, keep: int
) -> tuple[Sequence[int], list[torch.Tensor] | None]:
    """The layers to keep, and the channels of each one's MLP or None for all; prints the table of what cuts cost.

    In fp32, since bf16 rounds away small differences.
    """
    model = freeze(load_pretrained(args.teacher, dtype="float32"))
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    total = model.config.get_text_config().num_hidden_layers
    shows = args.layers is None and args.width is None
    blocks_at = range(keep, total) if shows else [keep]
    with tqdm(total=count_cuts(total, keep, blocks_at), unit="cut", disable=keep == total) as bar:

        def tell(phase: str) -> None:
            bar.set_description(phase)
            bar.update()

        bar.set_description("the teacher answers")
        text = answered(model, rows, stop_ids, pad)
        divergence = CutDivergence(model, text.input_ids, text.scored)
        cuts = search_cuts(divergence, keep, blocks_at, tell) if keep < total else {}
    scores = None
    with suppress(ValueError) if args.width is None else nullcontext():  # no MLPs that can be narrower
        scores = channel_scores(model, text.input_ids, text.attention_mask)
    if cuts:
        show_cuts(model, cuts, scores, divergence)
    kept = cuts[keep].kept if cuts else range(total)
    if args.width is None:
        return kept, None
    channels = best_channels([scores[i] for i in kept], channels_of(args.width, len(scores[0])))
    shrink(model, kept)
    with only_channels(model, channels):
        nats = divergence.of_now()
    print(
        f"Forward KL to the teacher with {len(channels[0])} of {len(scores[0])} MLP channels: {nats:.3f} nats per token."
    )
    return kept, channels


def answered(model: nn.Module, rows: list[dict[str, Any]], stop_ids: list[int], pad: int) -> Batch:
    """The prompts with the model's greedy answers."""
    collated = GKDCollator(pad)(rows)
    prompts = tuple(collated[name].to(model.device) for name in ("prompts", "prompt_attention_mask"))
    greedy = GenerationConfig(max_new_tokens=ANSWER, do_sample=False, pad_token_id=pad, eos_token_id=stop_ids)
    return training_batch(*prompts, *CompletionGenerator("dynamic")(model, *prompts, greedy), pad)


def show_cuts(
    model: nn.Module, cuts: dict[int, Cut], scores: list[torch.Tensor] | None, divergence: CutDivergence
) -> None:
    """Prints what each number of layers costs, and what narrower MLPs with as few parameters do, if there can be any."""
    layers = model.get_submodule(layer_list(model))
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    whole = sum(p.numel() for p in model.parameters())
    in_mlps = 0 if scores is None else sum(sum(p.numel() for p in mlp.parameters()) for mlp in gated_mlps(model))
    table = Table(title="What is left without layers", caption="Forward KL to the teacher, in nats per token.")
    for title in ("layers kept", "of the parameters", "forward KL"):
        table.add_column(title, justify="right")
    table.add_column("chosen")
    table.add_column("left out (the first layer is 0)")
    for title in ("or --width", "forward KL") if scores else ():
        table.add_column(title, justify="right")
    for size, cut in sorted(cuts.items(), reverse=True):
        out = sorted(set(range(len(layers))) - set(cut.kept))
        lost = sum(sizes[i] for i in out)
        cells = [str(size), f"{1 - lost / whole:.0%}", f"{cut.divergence:.3f}", cut.way, ", ".join(map(str, out))]
        if scores and lost < in_mlps:
            width = round(1 - lost / in_mlps, 3)
            with only_channels(model, best_channels(scores, channels_of(width, len(scores[0])))):
                cells += [f"{width:g}", f"{divergence.of_now():.3f}"]
        table.add_row(*cells)
    print_table(table)


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
