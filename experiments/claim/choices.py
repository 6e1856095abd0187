"""What experiments/claim_long.sh decides by results that it has.

python experiments/claim/choices.py start RESULTS     # accuracy of the student at the start, sampled
python experiments/claim/choices.py best RESULTS      # forward, jsd or reverse: the mixed_ cell of seed 1 that solves most, sampled
python experiments/claim/choices.py beta RESULTS      # that cell's
python experiments/claim/choices.py steps RESULTS CELL      # of supervised KD, that take the seconds of all steps of CELL
python experiments/claim/choices.py rescue DIAGNOSIS  # share of failed answers that the teacher mends, of gkd diagnose
"""

import argparse
import json
import re
import statistics
from pathlib import Path

BETAS = {"forward": 0, "jsd": 0.5, "reverse": 1}


def seeds(results: Path, name: str) -> list[dict]:
    """The records of a cell. Raises SystemExit if there is none."""
    lines = (results / "cells.jsonl").read_text(encoding="utf-8").splitlines()
    found = [record for record in map(json.loads, lines) if record["cell"] == name]
    if not found:
        raise SystemExit(f"{results}/cells.jsonl has no {name}: run the stages before.")
    return found


def start(results: Path) -> float:
    return statistics.mean(seed["student"]["sampled"]["accuracy"] for seed in seeds(results, "start"))


def best(results: Path) -> str:
    first = {
        name: seed["sampled"]["accuracy"]
        for name in BETAS
        for seed in seeds(results, f"mixed_{name}")
        if seed["seed"] == 1
    }
    return max(first, key=first.__getitem__)


def beta(results: Path) -> float:
    return BETAS[best(results)]


def steps(results: Path, cell: str) -> int:
    """Raises SystemExit where cells shared a GPU, whose seconds tell nothing."""
    both = [seeds(results, name) for name in ("on_policy_timed", "supervised_timed")]
    if any(seed["jobs"] > 1 for of_cell in both for seed in of_cell):
        raise SystemExit(f"{results}: cells shared a GPU (JOBS), so their seconds can't be compared.")
    on_policy, supervised = (statistics.median(seed["seconds_per_step"] for seed in of_cell) for of_cell in both)
    first = seeds(results, cell)[0]
    lmbda = float(re.search(r"--lmbda (\S+)", first["flags"])[1])
    return round(first["steps"] * (lmbda * on_policy + (1 - lmbda) * supervised) / supervised)


def rescue(diagnosis: Path) -> float:
    """0 where the teacher solves nothing."""
    found = json.loads((diagnosis / "diagnosis.json").read_text(encoding="utf-8"))["rescue"]
    return found["rate"] if found else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("start", "best", "beta", "steps", "rescue"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("more", nargs="*")
    args = parser.parse_args()
    print(globals()[args.what](args.folder, *args.more))


if __name__ == "__main__":
    main()
