"""Robustness of runs: resumed against uninterrupted ones, many kills in a row, and 10,000 steps in constant memory.

    python benchmarks/survival.py                       # all three, about 15 minutes on two CPU cores
    python benchmarks/survival.py --parts kills --kills 5

matrix  For each λ, source and number of ranks: an uninterrupted run, and one that crashes at a random step and is resumed.
        "equal" means that each step's text, losses and gradient norm, the logs, and the final weights agree to the last bit.
kills   SIGKILL at random steps, many times in a row; each start resumes. Reports the number of repeated steps, and whether
        the final weights equal those of a run without kills.
memory  Resident memory of the process over the steps; the slope is that of a line through the second half.

Uses tiny models (tests/tiny.py) on the CPU, or on a GPU if there is one; it does not measure speed.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

REPO = Path(__file__).parent.parent
WORKER = str(REPO / "tests/workers/resume_worker.py")
MIX = {"lmbda": 0.5, "seq_kd": True}


def worker(*words: object, ranks: int = 1, **kwargs) -> subprocess.Popen:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launcher, WORKER, *map(str, words)], env=environment, **kwargs)


def finish(process: subprocess.Popen) -> None:
    if process.wait() != 0:
        sys.exit(f"survival.py: exit code {process.returncode} of {process.args}")


def matrix(out: Path, ranks: list[int]) -> None:
    cases = {f"{lmbda} {source}": {"lmbda": lmbda, "seq_kd": source == "teacher"} for lmbda in (0.0, 0.5, 1.0) for source in ("dataset", "teacher")}  # fmt: skip
    print("| λ | other text | ranks | steps | crash at | resumed against whole |\n|---|---|---|---|---|---|")
    for count in ranks:
        folder = out / f"matrix-{count}"
        with (out / f"matrix-{count}.log").open("w") as log:
            finish(worker("matrix", folder, json.dumps(cases), ranks=count, stdout=log, stderr=log))
        by_rank = [json.loads((folder / f"matrix-{rank}.json").read_text()) for rank in range(count)]
        for case, result in by_rank[0].items():
            same = all(r[case]["weights"] and r[case]["logs"] and not r[case]["differ"] for r in by_rank)
            lmbda, source = case.split()
            first = min((step for r in by_rank for step in r[case]["differ"]), default=None)
            verdict = "equal" if same else f"differs from step {first}"
            print(f"| {lmbda} | {source} | {count} | {result['steps']} | {result['crash']} | {verdict} |", flush=True)


def lines_of(trace: Path) -> list[int]:
    """The steps in a trace, in order of execution, without an incomplete last line."""
    lines = trace.read_text().splitlines(keepends=True) if trace.is_file() else []
    return [json.loads(line)[0] for line in lines if line.endswith("\n")]


def kills(out: Path, count: int) -> None:
    options = json.dumps(MIX | {"max_steps": 12 * (count + 2), "save_steps": 5, "logging_steps": 50})
    whole, killed = out / "whole", out / "killed"
    with (out / "kills.log").open("w") as log:
        finish(worker("run", whole, options, stdout=log, stderr=log))
        done = 0
        while done < count:
            before = len(lines_of(killed / "trace-0.jsonl"))
            process = worker("run", killed, options, stdout=log, stderr=log)
            aim = before + random.randint(1, 20)
            while len(lines_of(killed / "trace-0.jsonl")) < aim and process.poll() is None:
                time.sleep(0.005)
            if process.poll() is not None:
                sys.exit(f"survival.py: the run was over after {done} kills: see {log.name}")
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
            print(f"kill {done} after step {lines_of(killed / 'trace-0.jsonl')[-1]}", flush=True)
        finish(worker("run", killed, options, stdout=log, stderr=log))
    steps = lines_of(killed / "trace-0.jsonl")
    starts = [(a, b) for a, b in itertools.pairwise(steps) if b <= a]
    lost = [a - b + 1 for a, b in starts]
    same = (killed / "final.safetensors").read_bytes() == (whole / "final.safetensors").read_bytes()
    print(
        f"{count} kills in {max(steps)} steps, a checkpoint each 5: {sum(lost)} steps done twice, at most {max(lost, default=0)} "
        f"after a kill; final weights {'equal' if same else 'DIFFER'}.",
        flush=True,
    )


def memory(out: Path, steps: int) -> None:
    options = MIX | {"max_steps": steps, "save_steps": 1000, "logging_steps": 100, "memory_each": 100}
    with (out / "memory.log").open("w") as log:
        finish(worker("run", out / "memory", json.dumps(options), stdout=log, stderr=log))
    at, mib = np.array(json.loads((out / "memory/memory.json").read_text())).T
    half = len(at) // 2
    slope, _ = np.polyfit(at[half:], mib[half:], 1)
    ends = ", ".join(f"{mib[i]:.1f} MiB at step {at[i]:.0f}" for i in (0, half, -1))
    print(f"{steps:,} steps: {ends}; slope of the second half {slope * 1000:.3f} MiB per 1000 steps.", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("runs/survival"))
    arguments.add_argument(
        "--parts", nargs="+", choices=["matrix", "kills", "memory"], default=["matrix", "kills", "memory"]
    )
    arguments.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    arguments.add_argument("--kills", type=int, default=20)
    arguments.add_argument("--steps", type=int, default=10_000)
    args = arguments.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if "matrix" in args.parts:
        matrix(out, args.ranks)
    if "kills" in args.parts:
        kills(out, args.kills)
    if "memory" in args.parts:
        memory(out, args.steps)


if __name__ == "__main__":
    main()
