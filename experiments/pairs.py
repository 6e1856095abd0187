"""Tasks and models of experiments/pairs.sh, all made here: `python experiments/pairs.py make OUT TASK`, `python experiments/pairs.py table OUT`.

    reverse   b i r d =          d r i b             an answer can be written in one way, and nothing can be mended
    sums      7 + 5 + 6 =        1 2 , 1 8           running totals; a wrong one spoils those behind it
    packing   order: nut2 tea1   + nut: nut1 tea0 …  experiments/claim/packing.py with two kinds; what went wrong can be mended

`make` writes OUT/TASK/train.jsonl, what a user has, teacher.jsonl, what the teacher learns (of packing also from wrong moves on),
held_out.jsonl, and two untrained Llamas with a token a word, digit or letter: teacher_init (four layers, width 128) and
student_init (two layers, width 64). `table` prints a line a pair: its diagnosis, and what both trainings gave.
"""

import argparse
import itertools
import json
import random
import re
import string
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.claim import packing
from gkd.io.files import write_whole

TEACHER, TRAIN, HELD_OUT = 8000, 2000, 200  # rows
WORDS = re.compile(r"[a-z]{2,}|.|\n")
SHAPES = {
    "teacher": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "student": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
}
Pair = tuple[str, str]  # prompt and completion


def reverse(draw: random.Random) -> Pair:
    letters = [draw.choice(string.ascii_lowercase) for _ in range(draw.randint(5, 9))]
    return " ".join(letters) + " =", " " + " ".join(reversed(letters))


def sums(draw: random.Random) -> Pair:
    terms = [draw.randint(1, 9) for _ in range(draw.randint(4, 7))]
    totals = list(itertools.accumulate(terms))[1:]
    return " + ".join(map(str, terms)) + " =", " " + " , ".join(map(str, totals))


def pack(draw: random.Random, make: Callable = packing.clean) -> Pair:
    row = make(draw.randint(3, 6), 2, draw)
    lines = [f"{line}\n" for line in row.lines]
    return f"{row.question}\n" + "".join(lines[: row.given]), "".join(lines[row.given :]).rstrip("\n")


def pack_from_anywhere(draw: random.Random) -> Pair:
    return pack(draw, draw.choice([packing.clean, packing.recovery, packing.perturbed]))


# Of each: what a user has, and what the teacher learns.
TASKS = {"reverse": (reverse, reverse), "sums": (sums, sums), "packing": (pack, pack_from_anywhere)}


def solved(completion: str, row: dict) -> float:
    """1.0 for a right answer, else 0.0: for --scorer. Of packing any order of right moves is."""
    known = json.loads(row["metadata"])
    if "names" not in known:
        return float(completion.strip() == known["answer"])
    return packing.solved(completion, row)


def metadata(prompt: str, completion: str) -> str:
    """What `solved` needs."""
    order = re.search(r"order: (.*)", prompt)
    if order is None:
        return json.dumps({"answer": completion.strip()})
    box = re.search(r"box: (.*)", prompt)
    counts = [[int(count) for count in re.findall(r"\d", found[1])] for found in (order, box)]
    return json.dumps({"names": re.findall(r"[a-z]+", order[1]), "order": counts[0], "box": counts[1]})


def rows_of(make: Callable[[random.Random], Pair], name: str, without: set[str]) -> Iterator[dict]:
    """Rows without end, no prompt twice, and none of those `without`, which it adds to."""
    draw = random.Random(f"1 {name}")
    while True:
        prompt, completion = make(draw)
        if prompt not in without:
            without.add(prompt)
            yield {"prompt": prompt, "completion": completion, "metadata": metadata(prompt, completion)}


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of the tasks, and for each character."""
    words = {word for text in (packing.QUESTION, "done", *packing.GOODS) for word in WORDS.findall(text)}
    vocab = [
        "<pad>",
        "<end>",
        *sorted(words | set(string.ascii_lowercase + string.digits + " +-=,:.\n{}O" + string.ascii_uppercase)),
    ]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS.pattern), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")


def make(out: Path, task: str) -> None:
    seen: set[str] = set()
    user, teacher = TASKS[task]
    for name, source, count in (("held_out", user, HELD_OUT), ("train", user, TRAIN), ("teacher", teacher, TEACHER)):
        lines = (json.dumps(row) for row in itertools.islice(rows_of(source, f"{task} {name}", seen), count))
        write_whole(out / task / f"{name}.jsonl", "\n".join(lines) + "\n")
    tokens = tokenizer()
    for seed, (name, shape) in enumerate(SHAPES.items()):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokens), num_key_value_heads=shape["num_attention_heads"], max_position_embeddings=512,
            tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None, **shape,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(out / task / f"{name}_init")
        tokens.save_pretrained(out / task / f"{name}_init")


def accuracy(run: Path) -> tuple[float, float]:
    """Before and after a training."""
    results = json.loads((run / "evaluation/results.json").read_text(encoding="utf-8"))["results"]
    found = {
        result["model"]: result["metrics"]["on_policy/scorer"]["value"]
        for result in results
        if result["model"] != "teacher"
    }
    return found["before"], next(value for model, value in found.items() if model != "before")


def table(out: Path) -> None:
    """A line a pair."""
    print(
        "| task | student at the start | rescued behind the error | in front of it | λ = 0 gains | λ = 1 gains | first advice |"
    )
    print("|---|---|---|---|---|---|---|")
    for place in sorted(out.glob("*/pair_*")):
        diagnosis = json.loads((place / "diagnosis/diagnosis.json").read_text(encoding="utf-8"))
        before, supervised = accuracy(place / "supervised")
        _, on_policy = accuracy(place / "on_policy")
        rescue = diagnosis["rescue"]
        shares = (
            [f"{rescue['rate']:.0%} of {rescue['failed']}", f"{rescue['before']['value']:.0%}"] if rescue else ["", ""]
        )
        gains = [f"{100 * (after - before):+.1f}" for after in (supervised, on_policy)]
        print(
            f"| {place.parent.name} | {before:.1%} | {' | '.join(shares)} | {' | '.join(gains)} | {diagnosis['advice'][0]['say']} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "table"))
    parser.add_argument("out", type=Path)
    parser.add_argument("task", nargs="?", choices=list(TASKS))
    args = parser.parse_args()
    if args.what == "table":
        table(args.out)
    else:
        make(args.out, args.task)


if __name__ == "__main__":
    main()
