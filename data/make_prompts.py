"""Makes prompts_train.json and prompts_heldout.json, the prompts of the quickstart; the same bytes each time.

    pip install -e '.[prompts]' && python data/make_prompts.py

Two kinds: puzzles that reasoning-gym (Apache-2.0) generates from a seed, and everyday_prompts.txt, written for gkd.
"""

import hashlib
import json
from pathlib import Path

import reasoning_gym

HERE = Path(__file__).parent
TASKS = (
    "basic_arithmetic chain_sum count_primes decimal_arithmetic fraction_simplification gcd lcm leg_counting "
    "number_sorting power_function prime_factorization products simple_equations time_intervals calendar_arithmetic "
    "caesar_cipher letter_counting spell_backward word_sorting sentence_reordering letter_jumble isomorphic_strings "
    "base_conversion bitwise_arithmetic family_relationships syllogism number_format roman_numeral_conversion"
).split()
PER_TASK, LONGEST, HELD_OUT_SHARE = 14, 220, 10  # characters; a tenth is held out


def puzzles() -> list[str]:
    """`PER_TASK` short questions of each task that this reasoning-gym has."""
    found = []
    for name in TASKS:
        if name in reasoning_gym.factory.DATASETS:
            data = reasoning_gym.create_dataset(name, size=40, seed=7)
            short = [item["question"].strip() for item in data if len(item["question"]) <= LONGEST]
            found += list(dict.fromkeys(short))[:PER_TASK]
    return found


def is_held_out(prompt: str) -> bool:
    """By the prompt's own hash, so that none changes sides when others come or go."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def main() -> None:
    everyday = (HERE / "everyday_prompts.txt").read_text(encoding="utf-8").splitlines()
    prompts = sorted(dict.fromkeys(puzzles() + everyday), key=lambda p: hashlib.sha256(p.encode()).hexdigest())
    for name, held_out in (("prompts_train.json", False), ("prompts_heldout.json", True)):
        rows = [{"prompt": [{"role": "user", "content": p}]} for p in prompts if is_held_out(p) == held_out]
        text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (HERE / name).write_text(f"[\n{text}\n]\n", encoding="utf-8")
        print(f"{name}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
