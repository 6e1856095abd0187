"""A student with the teacher's weights and another tokenizer: `python experiments/other_tokenizer.py TEACHER OUT`

Trains a tokenizer of the same kind on the prompts of data/, with the same special tokens and chat template, and gives each of its
tokens the mean of the teacher's embeddings of what it is made of. Writes OUT/student; OUT/train.json, the prompts of data/ with those
of the teacher's answers that end, sampled once; and OUT/held_out.json with some of the held-out prompts.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gkd.data.batch import padded_rows, unpadded_rows
from gkd.generation.generator import CompletionGenerator
from gkd.generation.sampling import sampling_noise, sampling_seed
from gkd.io.files import appearing, write_whole
from gkd.models.tokenizers import stop_token_ids

DATA = Path(__file__).parents[1] / "data"
TOKENS, HELD_OUT = 4096, 24
LONGEST, TOGETHER = 48, 46  # tokens of an answer, and rows that are written at a time


def answered(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[dict]:
    """The rows whose answer ends, with it. Raises SystemExit if none does."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    writer, generator = model.eval().to(device), CompletionGenerator()
    stop_ids = stop_token_ids(tokenizer, model.config, model.generation_config)
    pad = stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(max_new_tokens=LONGEST, pad_token_id=pad, eos_token_id=stop_ids, **sampled)
    complete = []
    for start in range(0, len(rows), TOGETHER):
        part = rows[start : start + TOGETHER]
        asked = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in part]
        prompts, mask = (of.to(device) for of in padded_rows(asked, pad, left=True))
        with sampling_noise(sampling_seed(0, start, 0), device):
            texts = unpadded_rows(*generator(writer, prompts, mask, config))
        print(f"{start + len(part)} of {len(rows)} prompts are answered.", flush=True)
        for row, (*text, last) in zip(part, texts, strict=True):
            if last in stop_ids and text:
                completion = [{"role": "assistant", "content": tokenizer.decode(text)}]
                complete.append({"prompt": row["prompt"], "completion": completion})
    if not complete:
        sys.exit(
            f"experiments/other_tokenizer.py: none of the teacher's {len(rows)} answers ends within {LONGEST} tokens."
        )
    model.cpu()
    return complete


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("teacher")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=368, help="at most so many of data/ are answered (all, 368)")
    args = parser.parse_args()
    theirs = AutoTokenizer.from_pretrained(args.teacher)
    model = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
    rows = json.loads((DATA / "prompts_train.json").read_text(encoding="utf-8"))
    corpus = [message["content"] for row in rows for message in row["prompt"]]
    ours = theirs.train_new_from_iterator(corpus, TOKENS, show_progress=False)
    asked = rows[:: max(len(rows) // args.prompts, 1)][: args.prompts]
    answers = answered(model, theirs, asked)
    known, split = theirs.get_vocab(), theirs.backend_tokenizer.model.tokenize
    embeddings = model.get_input_embeddings().weight.detach().clone()
    means = torch.empty(len(ours), embeddings.shape[1])
    for token, index in ours.get_vocab().items():
        ids = [known[token]] if token in known else [piece.id for piece in split(token)]
        means[index] = (
            embeddings[ids].mean(0) if ids else embeddings.mean(0)
        )  # a byte that the teacher has no token for
    model.resize_token_embeddings(len(ours), mean_resizing=False)
    model.get_input_embeddings().weight.data.copy_(means)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = ours.bos_token_id, ours.eos_token_id, ours.pad_token_id  # fmt: skip
    with appearing(args.out / "student") as folder:
        model.save_pretrained(folder)
        ours.save_pretrained(folder)
    held_out = json.loads((DATA / "prompts_heldout.json").read_text(encoding="utf-8"))[:: 50 // HELD_OUT][:HELD_OUT]
    write_whole(args.out / "train.json", json.dumps(answers, ensure_ascii=False))
    write_whole(args.out / "held_out.json", json.dumps(held_out))
    print(
        f"{args.out / 'student'}: {len(ours)} tokens, of which the teacher has {len(ours.get_vocab().keys() & known)}; "
        f"{len(answers)} of {len(asked)} answers end."
    )


if __name__ == "__main__":
    main()
