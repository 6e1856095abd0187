"""The task of the claim: arithmetic and strings by reasoning-gym, answered with the steps that lead there.

    python experiments/claim/tasks.py runs/claim/data --train 1000

writes, with 1000 rows of each task for the student, the same bytes each time and with no question twice,

    teacher/train.jsonl   what the teacher is tuned on
    train.jsonl           the student's prompts, with worked answers
    prompts.jsonl         the same as chats whose answer is empty, the shape of many users' data
    held_out.jsonl        for evaluation
    probe.jsonl           for --lmbda auto to look at: some of the teacher's rows

The last line of a worked answer holds the answer between <answer> tags, which reasoning-gym's verifier then reads.
"""

import argparse
import functools
import itertools
import json
import random
from pathlib import Path

import reasoning_gym
from reasoning_gym.arithmetic.leg_counting import ANIMALS
from reasoning_gym.utils import extract_answer

from gkd.metrics.tasks import TaskMetrics

# Of each task: what its difficulty is drawn from.
TASKS = {
    "chain_sum": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 3},
    "products": {"min_digits": 1, "max_digits": 2},
    "gcd": {"min_value": 2, "max_value": 100},
    "leg_counting": {"min_animals": 2, "max_animals": 3, "max_instances": 12},
    "spell_backward": {"min_word_len": 3, "max_word_len": 9},
    "letter_counting": {"min_words": 2, "max_words": 4},
    "word_sequence_reversal": {"min_words": 3, "max_words": 8},
}
SEED = 1
SHARES = {"held_out": 200, "train": 1000, "teacher/train": 10_000}  # rows of each task, as far as there are so many
PROBE = 128  # rows in all


def chain_sum(metadata: dict) -> list[str]:
    first, *rest = metadata["expression"].split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    return lines


def products(metadata: dict) -> list[str]:
    left, right = map(int, metadata["expression"].split(" * "))
    if min(left, right) < 10:
        return [f"{left} * {right} = {left * right}"]
    tens, ones = left * (right // 10 * 10), left * (right % 10)
    return [
        f"{left} * {right // 10 * 10} = {tens}",
        f"{left} * {right % 10} = {ones}",
        f"{tens} + {ones} = {left * right}",
    ]


def gcd(metadata: dict) -> list[str]:
    large, small = max(metadata["numbers"]), min(metadata["numbers"])
    lines = []
    while small:
        lines.append(f"{large} % {small} = {large % small}")
        large, small = small, large % small
    return lines


def leg_counting(metadata: dict) -> list[str]:
    lines, total = [], 0
    for animal, count in metadata["animals"].items():
        legs = count * ANIMALS[animal]
        lines.append(f"{animal}: {count} * {ANIMALS[animal]} = {legs}, {total} + {legs} = {total + legs}")
        total += legs
    return lines


def spell_backward(metadata: dict) -> list[str]:
    return [" ".join(metadata["word"]), " ".join(reversed(metadata["word"]))]


def letter_counting(metadata: dict) -> list[str]:
    lines, total = [], 0
    for word in metadata["span"]:
        total += word.count(metadata["target_letter"])
        lines.append(f"{' '.join(word)}: {total}")
    return lines


def word_sequence_reversal(metadata: dict) -> list[str]:
    return []


def worked_answer(entry: dict) -> str:
    """The steps of a reasoning-gym entry, one a line, and its answer."""
    steps = globals()[entry["metadata"]["source_dataset"]](entry["metadata"])
    return "\n".join([*steps, f"<answer>{entry['answer']}</answer>"])


@functools.cache
def _verifier() -> TaskMetrics:
    return TaskMetrics(["reasoning_gym"])


def solved(completion: str, row: dict) -> float:
    """1.0 if reasoning-gym's verifier gives the tagged answer full marks, else 0.0: for --scorer."""
    answer = extract_answer(completion)
    if answer is None:
        return 0.0
    return float(_verifier().row_scores(0, answer, None, row)["reasoning_gym"] >= 1.0)


def _entries(name: str, config: dict, count: int) -> list[dict]:
    """Up to `count` entries of a task, in random order, no question twice."""
    entries = {}
    for entry in reasoning_gym.create_dataset(name, size=2 * count, seed=SEED, **config):
        entries.setdefault(entry["question"].strip(), entry)
    found = list(entries.values())
    random.Random(f"{SEED} {name}").shuffle(found)
    return found[:count]


def _row(entry: dict) -> dict:
    question = entry["question"].strip()
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": worked_answer(entry)}],
        "question": question,
        "answer": entry["answer"],
        "metadata": json.dumps(entry["metadata"]),
    }


def _write(path: Path, rows: list[dict]) -> None:
    random.Random(SEED).shuffle(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=SHARES["train"], help="rows of each task for the student")
    args = parser.parse_args()
    shares, out = {**SHARES, "train": args.train}, args.out
    rows = {name: [] for name in SHARES}
    for task, config in TASKS.items():
        entries = iter(_entries(task, config, sum(SHARES.values())))
        for name, share in shares.items():  # fewer for the student leave the others as they are
            rows[name] += [_row(entry) for entry in itertools.islice(entries, max(share, SHARES[name]))][:share]
    rows["teacher/train"] = [{key: row[key] for key in ("prompt", "completion")} for row in rows["teacher/train"]]
    for name in SHARES:
        _write(out / f"{name}.jsonl", rows[name])
    _write(out / "probe.jsonl", rows["teacher/train"][:PROBE])  # shuffled by now: of all tasks
    empty = [{"role": "assistant", "content": ""}]
    _write(out / "prompts.jsonl", [{"messages": row["prompt"] + empty} for row in rows["train"]])


if __name__ == "__main__":
    main()
