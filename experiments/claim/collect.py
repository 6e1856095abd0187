"""What a cell of the claim came to, as one small JSON file that can stand in git: OUT/results/NAME.json.

python experiments/claim/collect.py OUT on_policy_jsd-1 --flags "--lmbda 1"
python experiments/claim/collect.py OUT start       # the student that all cells start from, and the teacher
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from gkd.report.runs import Run, load_run
from gkd.results import records_of
from gkd.whole_file import write_whole

# By their names in the file: on the model's own text, and on the rows' answers.
FIGURES = {
    "accuracy": "score/solved",
    "reverse_kl": "on_policy/reverse_kl",
    "entropy": "on_policy/student_entropy",
    "length": "on_policy/completion_length",
    "forward_kl": "dataset/forward_kl",
}
TRAINING = ("on_policy/student_entropy", "on_policy/completion_length", "on_policy/reverse_kl")


def figures(result: dict) -> dict[str, float]:
    return {
        name: round(result["metrics"][key]["value"], 5) for name, key in FIGURES.items() if key in result["metrics"]
    }


def step_of(result: dict) -> int:
    """Of a run's own result; eval_gkd.py calls a checkpoint by its folder."""
    return result["step"] if result["step"] is not None else int(result["model"].rpartition("-")[2])


def rows_of(run: Run, result: dict) -> dict[str, str | dict[str, float]]:
    """Which rows were solved, a bit each as hexadecimal digits, the first row's the highest; and the share by task."""
    rows = [json.loads(line) for line in Path(result["data"]).read_text(encoding="utf-8").splitlines()]
    records = records_of(run.folder, result["model"], result["data"], result["settings"])
    bits = [int(record["scores"]["solved"]) for record in records]
    tasks: dict[str, list[int]] = {}
    for record, bit in zip(records, bits, strict=True):
        tasks.setdefault(json.loads(rows[record["row"]]["metadata"])["source_dataset"], []).append(bit)
    return {
        "rows": len(bits),
        "solved": f"{int(''.join(map(str, bits)), 2):x}",
        "tasks": {task: round(statistics.mean(found), 4) for task, found in sorted(tasks.items())},
    }


def measured(run: Run, name: str) -> dict:
    """Figures and rows of one model in a folder of results."""
    result = run.result(name)
    return figures(result) | rows_of(run, result)


def start(out: Path) -> dict:
    runs = {name: load_run(out / "start" / temperature) for name, temperature in (("sampled", "1"), ("greedy", "0"))}
    return {
        model: {name: measured(run, model) for name, run in runs.items()} for model in ("student", "teacher")
    }  # fmt: skip


def cell(out: Path, name: str) -> dict:
    run = load_run(out / "cells" / name)
    results = sorted((r for r in run.results if r["model"] not in ("teacher", "after")), key=step_of)
    seconds, before = [], 0
    for log in run.logs:  # wall seconds of the steps since the log before, without evaluation and capturing of graphs
        if "seconds_training" in log and log["step"] > before:
            spent = log.get("seconds_generating", 0.0) + log["seconds_training"]
            seconds.append(spent / (log["step"] - before))
            before = log["step"]
    (greedy,) = (
        load_run(folder)
        for folder in out.glob("greedy/*")
        if any(r["model"] == name for r in load_run(folder).results)
    )
    return {
        "cell": name.rpartition("-")[0],
        "seed": int(name.rpartition("-")[2]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "steps": before,
        "seconds_per_step": round(statistics.median(seconds), 4),
        "curve": [{"step": step_of(result), **figures(result)} for result in results],
        "sampled": measured(run, results[-1]["model"]),
        "greedy": measured(greedy, name),
        "training": [
            {"step": log["step"], **{key.split("/")[1]: round(log[key], 4) for key in TRAINING}}
            for log in run.logs
            if all(key in log for key in TRAINING)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("name", help="cell-seed, or start")
    parser.add_argument("--flags", default="", help="what the cell differs by")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time on its GPU")
    args = parser.parse_args()
    found = start(args.out) if args.name == "start" else cell(args.out, args.name)
    told = found if args.name == "start" else {"flags": args.flags, "jobs": args.jobs, **found}
    (args.out / "results").mkdir(exist_ok=True)
    write_whole(args.out / "results" / f"{args.name}.json", json.dumps(told) + "\n")
    print(f"{args.name}: " + json.dumps({k: v["accuracy"] for k, v in found.items() if k in ("sampled", "greedy")}))


if __name__ == "__main__":
    main()
