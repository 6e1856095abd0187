"""Lets a chat model write prompts, for distillations that have few.

    python experiments/self_prompts.py HuggingFaceTB/SmolLM2-135M-Instruct -n 12000 -o prompts.jsonl

A chat model has learned what users ask. Where its template has opened a user's turn, it goes on with one, as Magpie does
(arXiv 2406.08464). Kept are turns that end, of 4 to 128 tokens, each once, and none of the held-out prompts. The same seed on
the same device writes the same prompts.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from gkd.cli.start import quiet_imports
from gkd.config.command_line import CommandParser
from gkd.config.values import check_seed
from gkd.data.rows import prompt_of
from gkd.io.paths import check_model, check_output

PROG = "experiments/self_prompts.py"
HELD_OUT = Path(__file__).parent.parent / "data/prompts_heldout.json"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The checked command line."""
    parser = CommandParser(prog=PROG, description=__doc__)
    flag = parser.add_argument
    flag("teacher", metavar="TEACHER", help="folder or hub id of a chat model")
    flag("-n", "--count", type=int, required=True, metavar="N", help="prompts to write")
    flag("-o", "--output", type=Path, required=True, metavar="FILE", help="JSON lines, a row of each prompt")
    flag("--temperature", type=float, default=1.0, metavar="X", help="of sampling, above 0")
    flag("--seed", type=int, default=0, metavar="N", help="of sampling")
    flag("--device", choices=["cpu", "cuda"], help="of the model (default: cuda, where there is one)")
    flag("--held_out", type=Path, default=HELD_OUT, metavar="FILE", help="rows whose prompts are left out")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error("-n must be at least 1.")
    if not 0 < args.temperature < float("inf"):
        parser.error("--temperature must be above 0.")
    if args.output.is_dir():
        parser.error(f"-o {args.output} is a folder: name a file.")
    with parser.refusals():
        check_seed(args, "seed")
        check_model("TEACHER", args.teacher)
        check_output("-o", args.output.parent)
    return args


if __name__ == "__main__":  # help and wrong flags are answered before the imports below, which take seconds
    quiet_imports(PROG)
    parse(sys.argv[1:])

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from gkd.data.batch import unpadded_rows
from gkd.data.continuation import text_ids
from gkd.data.loading import check_rows, load_rows
from gkd.data.templating import Template
from gkd.generation.generator import CompletionGenerator
from gkd.generation.sampling import sampling_noise, sampling_seed
from gkd.io.errors import one_line_errors, refusals
from gkd.io.files import write_whole
from gkd.io.paths import not_loaded
from gkd.models.loading import freeze, load_pretrained, read_configs
from gkd.models.tokenizers import stop_token_ids

SHORTEST, LONGEST = 4, 128  # tokens of a prompt
ROWS = {"cpu": 64, "cuda": 1024}  # written together
LEAST_KEPT = 0.02  # of what is written; below, the model writes no prompts
# Is cut off from a templated turn. No template changes it, and none holds it.
MARK = "MARK5e1f"


def opened_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of all that the chat template writes before a user's first words, a default system prompt included.

    Raises ValueError for a tokenizer without a template, or one that shows no user's text.
    """
    if tokenizer.chat_template is None:
        raise ValueError("TEACHER has no chat template, which tells where a user's turn begins: take a chat model.")
    text = Template(tokenizer, None, {}, False, []).render([{"role": "user", "content": MARK}], ask=False)
    head, mark, _ = text.partition(MARK)
    if not (mark and head):
        raise ValueError("TEACHER's chat template writes nothing before a user's text, so it opens no turn.")
    return text_ids(tokenizer, head)


def turn_writer(args: argparse.Namespace, device: torch.device) -> Callable[[int], list[str | None]]:
    """Loads the model; the function writes turns with the noise of a step, None for each that is no prompt.

    Raises ValueError if the model can't be loaded, or as `opened_turn` does.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.teacher, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare ones
        raise ValueError(not_loaded("TEACHER", args.teacher, error, "its tokenizer")) from error
    head = opened_turn(tokenizer)
    configs = read_configs("TEACHER", args.teacher, trust_remote_code=False)
    stop_ids = stop_token_ids(tokenizer, *configs)
    model = load_pretrained(args.teacher, dtype="bfloat16" if device.type == "cuda" else "float32")
    model = freeze(model).to(device)
    config = GenerationConfig(
        max_new_tokens=LONGEST + 1,
        do_sample=True,
        temperature=args.temperature,
        top_k=0,
        top_p=1.0,
        pad_token_id=stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        eos_token_id=stop_ids,
        # Ids that pad the vocabulary mean nothing.
        suppress_tokens=list(range(len(tokenizer), configs[0].get_text_config().vocab_size)) or None,
    )
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*stop_ids}
    generator = CompletionGenerator()
    prompts = torch.tensor([head], device=device).repeat(ROWS[device.type], 1)

    def text_of(ids: list[int]) -> str | None:
        *turn, last = ids
        if last not in stop_ids or not SHORTEST <= len(turn) <= LONGEST or special.intersection(turn):
            return None
        return tokenizer.decode(turn).strip() or None

    def write(step: int) -> list[str | None]:
        with sampling_noise(sampling_seed(args.seed, step, 0), device):
            return list(map(text_of, unpadded_rows(*generator(model, prompts, torch.ones_like(prompts), config))))

    return write


def self_prompts(args: argparse.Namespace) -> list[str]:
    """`args.count` prompts. Raises ValueError if the model hardly writes any, or can't be loaded."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU. Leave the flag out, or install a CUDA build of torch.")
    rows = load_rows(str(args.held_out), "train")
    check_rows(rows, str(args.held_out), needs_answers=False)
    held_out, write = set(map(prompt_of, rows)), turn_writer(args, device)
    kept: dict[str, None] = {}  # in the order they come
    step = total = 0
    with tqdm(total=args.count, unit="prompt", desc="the teacher asks") as bar:
        while len(kept) < args.count:
            texts = write(step)
            kept |= dict.fromkeys(text for text in texts if text is not None and text not in held_out)
            step, total = step + 1, total + len(texts)
            bar.update(min(len(kept), args.count) - bar.n)
            if len(kept) < LEAST_KEPT * total:
                raise ValueError(
                    f"{args.teacher} wrote {total:,} turns of a user, and {len(kept):,} of them are different prompts that "
                    f"end, of {SHORTEST} to {LONGEST} tokens. Ask for fewer by -n, or take another chat model."
                )
    return list(kept)[: args.count]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with one_line_errors(PROG, "The same command starts again."), refusals(PROG):
        texts = self_prompts(args)
        rows = ({"prompt": [{"role": "user", "content": text}]} for text in texts)
        write_whole(args.output, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    print(f"{args.output}: {len(texts):,} prompts.")


if __name__ == "__main__":
    main()
