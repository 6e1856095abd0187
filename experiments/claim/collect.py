"""What a cell of the claim came to, as a line of JSON in a file that can stand in git: OUT/results/cells.jsonl.

python experiments/claim/collect.py OUT on_policy_jsd-1 --flags "--lmbda 1"
python experiments/claim/collect.py OUT start-1     # the student that all cells start from, and the teacher
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from filelock import FileLock

from gkd.io.files import write_whole
from gkd.report.runs import Run, load_run
from gkd.runs.results import records_of

# By their names in the file: on the model's own text, and on the rows' answers.
FIGURES = {
    "accuracy": "score/solved",
    "reverse_kl": "on_policy/reverse_kl",
    "entropy": "on_policy/student_entropy",
    "length": "on_policy/completion_length",
    "forward_kl": "dataset/forward_kl",
}
TRAINING = (
    "loss",
    "grad_norm",
    "lmbda_since",
    "lmbda_probes",
    "lmbda_gain_supervised",
    "lmbda_gain_on_policy",
    "lmbda_gain_error",
    "rollout_guard",
    "on_policy/student_entropy",
    "on_policy/completion_length",
    "on_policy/reverse_kl",
)


def figures(result: dict) -> dict[str, float]:
    return {
        name: round(result["metrics"][key]["value"], 5) for name, key in FIGURES.items() if key in result["metrics"]
    }


def step_of(result: dict) -> int:
    """eval_gkd.py calls a checkpoint by its folder."""
    return int(result["model"].rpartition("-")[2])


def measured(run: Run, result: dict) -> dict:
    """Figures of a model; which rows it solved, a bit each as hexadecimal digits, the first row's the highest; by task."""
    rows = [json.loads(line) for line in Path(result["data"]).read_text(encoding="utf-8").splitlines()]
    records = records_of(run.folder, result["model"], result["data"], result["settings"])
    bits = [int(record["scores"]["solved"]) for record in records]
    tasks: dict[str, list[int]] = {}
    for record, bit in zip(records, bits, strict=True):
        tasks.setdefault(json.loads(rows[record["row"]]["metadata"])["source_dataset"], []).append(bit)
    return {
        **figures(result),
        "rows": len(bits),
        "solved": f"{int(''.join(map(str, bits)), 2):x}",
        "tasks": {task: round(statistics.mean(found), 4) for task, found in sorted(tasks.items())},
    }


def start(seed: int, sampled: Run, greedy: Run) -> dict:
    return {"cell": "start", "seed": seed} | {
        model: {kind: measured(run, run.result(model)) for kind, run in (("sampled", sampled), ("greedy", greedy))}
        for model in ("student", "teacher")
    }


def timed(name: str, seed: int, trained: Run) -> dict:
    """Of a cell whose training is all that is known of it."""
    seconds, before = [], 0
    for log in trained.steps:  # wall seconds of the steps since the log before, without capturing of graphs
        if log["step"] > before:
            spent = log.get("seconds_generating", 0.0) + log["seconds_training"]
            seconds.append(spent / (log["step"] - before))
            before = log["step"]
    return {
        "cell": name,
        "seed": seed,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "steps": before,
        "seconds_per_step": round(statistics.median(seconds), 4),
    }


def cell(trained: Run, sampled: Run, greedy: Run) -> dict:
    """What was measured of it, and its log."""
    results = sorted(sampled.others, key=step_of)
    return {
        "curve": [{"step": step_of(result), **figures(result)} for result in results],
        "sampled": measured(sampled, results[-1]),
        "greedy": measured(greedy, greedy.result(results[-1]["model"])),
        "training": [
            {"step": log["step"]}
            | {key.rpartition("/")[2]: float(f"{log[key]:.4g}") for key in TRAINING if key in log}
            for log in trained.steps
        ],
    }


def put(path: Path, record: dict) -> None:
    """Writes a line of the file, in the place of the one that the cell had with this seed. Other processes may do so too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        written = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        lines = {}
        for line in [*written, json.dumps(record)]:
            place = json.loads(line)
            lines[place["cell"], place["seed"]] = line
        write_whole(path, "".join(f"{line}\n" for line in lines.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("name", help="CELL-SEED, or start-SEED")
    parser.add_argument("--flags", default="", help="what the cell differs by")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time on its GPU")
    args = parser.parse_args()
    name, _, seed = args.name.rpartition("-")
    measured_in = [args.out / "measured" / args.name / kind for kind in ("sampled", "greedy")]
    if name == "start":
        record = start(int(seed), *map(load_run, measured_in))
        accuracy = {
            model: {kind: record[model][kind]["accuracy"] for kind in record[model]}
            for model in ("student", "teacher")
        }
    else:
        record = {"flags": args.flags.replace(str(args.out), "$OUT"), "jobs": args.jobs}
        trained = load_run(args.out / "cells" / args.name)
        record |= timed(name, int(seed), trained)
        if name.endswith("_timed"):
            accuracy = f"{record['seconds_per_step']} s a step"
        else:
            record |= cell(trained, *map(load_run, measured_in))
            accuracy = {kind: record[kind]["accuracy"] for kind in ("sampled", "greedy")}
    put(args.out / "results/cells.jsonl", record)
    print(f"{args.name}: {accuracy}")


if __name__ == "__main__":
    main()
