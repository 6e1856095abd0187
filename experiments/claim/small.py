"""Models of a million parameters for the task of the claim at length, which learn it on a CPU: random ones, to be trained.

python -m experiments.claim.small OUT       # OUT/deep (3 layers) and OUT/shallow (2), with a tokenizer whose words are the task's
python -m experiments.claim.small --table OUT   # what experiments/diagnosis_pairs.sh came to
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.claim.packing import GOODS, QUESTION

END, USER, ASSISTANT = "<end>", "<user>", "<assistant>"
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<user>{{ message['content'] }}{% else %}<assistant>"
    "{{ message['content'] }}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORD = Regex(r" ?[a-zA-Z]+|[^a-zA-Z]")


def tokenizer() -> PreTrainedTokenizerFast:
    """Its tokens are the words of the task, with a space before them or without, and single characters."""
    split = pre_tokenizers.Split(WORD, "isolated")
    pieces = [piece.strip() for piece, _ in split.pre_tokenize_str(f"{QUESTION} done")]
    names = [*filter(str.isalpha, pieces), *GOODS]
    words = dict.fromkeys([*names, *(f" {name}" for name in names), *"0123456789+-:., \n"])
    special = ["<pad>", END, USER, ASSISTANT]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<pad>"))
    core.pre_tokenizer, core.decoder = split, decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token=END, additional_special_tokens=[USER, ASSISTANT]
    )
    made.chat_template = TEMPLATE
    return made


def save(folder: Path, layers: int) -> None:
    torch.manual_seed(layers)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


def table(out: Path) -> str:
    """A line a pair: what the diagnosis found, and what trainings then gained in points, sampled and greedy."""
    lines = [
        "| teacher, rows of the student | teacher solves | student solves | rescued | accepted | supervised KD gains | λ = 0.5 gains |",
        "|---|---|---|---|---|---|---|",
    ]
    for folder in sorted(path for path in (out / "pairs").iterdir() if (path / "measured/greedy/evaluation").exists()):
        found = json.loads((folder / "diagnosis/diagnosis.json").read_text(encoding="utf-8"))
        solved = {name: [_solved(folder / "measured" / kind, name) for kind in ("sampled", "greedy")] for name in ("teacher", "student", "supervised", "mixed")}  # fmt: skip
        gains = [[100 * (after - before) for after, before in zip(solved[name], solved["student"], strict=True)] for name in ("supervised", "mixed")]  # fmt: skip
        rescue = found["rescue"]
        accepted = 1 - found["student"]["figures"]["on_policy/loss"]["value"]
        solves = [" ".join(f"{value:.0%}" for value in solved[name]) for name in ("teacher", "student")]
        gained = [" ".join(f"{gain:+.1f}" for gain in of_one) for of_one in gains]
        rescued = "–" if rescue is None else f"{rescue['rate']:.0%}"
        lines.append(
            "| " + " | ".join([folder.name.replace("-", ", "), *solves, rescued, f"{accepted:.0%}", *gained]) + " |"
        )
    return "\n".join(lines)


def _solved(evaluation: Path, model: str) -> float:
    results = json.loads((evaluation / "evaluation/results.json").read_text(encoding="utf-8"))["results"]
    return statistics.mean(r["metrics"]["score/solved"]["value"] for r in results if r["model"] == model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--table", action="store_true", help="print the pairs' table")
    args = parser.parse_args()
    if args.table:
        print(table(args.out))
        return
    save(args.out / "deep", 3)
    save(args.out / "shallow", 2)


if __name__ == "__main__":
    main()
