"""A student with the teacher's weights and another tokenizer: `python experiments/other_tokenizer.py TEACHER OUT`

Trains a tokenizer of the same kind on the prompts of data/, with the same special tokens and chat template, and gives each of its
tokens the mean of the teacher's embeddings of what it is made of. Writes OUT/student, and OUT/held_out.json with some of the held-out prompts.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gkd.io.files import appearing, write_whole

DATA = Path(__file__).parents[1] / "data"
TOKENS, HELD_OUT = 4096, 24


def corpus() -> list[str]:
    rows = json.loads((DATA / "prompts_train.json").read_text(encoding="utf-8"))
    return [message["content"] for row in rows for message in row["prompt"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("teacher")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    theirs = AutoTokenizer.from_pretrained(args.teacher)
    model = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
    ours = theirs.train_new_from_iterator(corpus(), TOKENS, show_progress=False)
    known, split = theirs.get_vocab(), theirs.backend_tokenizer.model.tokenize
    embeddings = model.get_input_embeddings().weight.detach().clone()
    rows = torch.empty(len(ours), embeddings.shape[1])
    for token, index in ours.get_vocab().items():
        ids = [known[token]] if token in known else [piece.id for piece in split(token)]
        rows[index] = (
            embeddings[ids].mean(0) if ids else embeddings.mean(0)
        )  # a byte that the teacher has no token for
    model.resize_token_embeddings(len(ours), mean_resizing=False)
    model.get_input_embeddings().weight.data.copy_(rows)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = ours.bos_token_id, ours.eos_token_id, ours.pad_token_id  # fmt: skip
    with appearing(args.out / "student") as folder:
        model.save_pretrained(folder)
        ours.save_pretrained(folder)
    held_out = json.loads((DATA / "prompts_heldout.json").read_text(encoding="utf-8"))[:: 50 // HELD_OUT][:HELD_OUT]
    write_whole(args.out / "held_out.json", json.dumps(held_out))
    print(
        f"{args.out / 'student'}: {len(ours)} tokens, of which the teacher has {len(ours.get_vocab().keys() & known)}"
    )


if __name__ == "__main__":
    main()
