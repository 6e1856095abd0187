"""Seconds of a training step with its teacher in the process, and with the same one behind `gkd serve` on this machine.

    python benchmarks/served.py
    python benchmarks/served.py --shapes micro small --steps 12

The models have random weights; λ = 0, four micro-batches of two rows a step. Both trainings take turns, twice, and the table
has the median of all steps but the first of each. Over the loopback of one machine the network costs next to nothing, and
the server computes on cores that a teacher in the process leaves idle, or takes them from the student: figures of two
machines differ.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import REPO
from datasets import Dataset
from random_pair import SHAPES, tokenizer, write_pair
from transformers import AutoModelForCausalLM, TrainerCallback

from gkd.config.teacher import TeacherArguments
from gkd.config.training import GKDArguments
from gkd.teachers import describe
from gkd.training.trainer import GKDTrainer


class Times(TrainerCallback):
    def __init__(self):
        self.ends = []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())

    @property
    def seconds(self):
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


def train(pair: Path, teacher, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each step but the first, and all losses."""
    rows = [{"prompt": f"question {i}", "completion": "an answer " * (4 + i % 9)} for i in range(64)]
    args = GKDArguments(
        output_dir=str(pair / "run"), lmbda=0.0, beta=0.5, max_steps=steps, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, gradient_checkpointing=False, bf16=False, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    times, student = Times(), AutoModelForCausalLM.from_pretrained(pair / "student", dtype="float32")
    more = {"processing_class": tokenizer(), "callbacks": [times]}
    trainer = GKDTrainer(student, teacher, args, train_dataset=Dataset.from_list(rows), **more)
    trainer.train()
    return times.seconds, [log["loss"] for log in trainer.state.log_history if "loss" in log]


def measure(shape: str, folder: Path, steps: int) -> str:
    """A row of the table."""
    write_pair(folder, "micro" if shape == "micro" else "tiny", shape, vocab_size=SHAPES[shape]["vocab_size"])
    words = [
        sys.executable,
        "-m",
        "gkd",
        "serve",
        str(folder / "teacher"),
        "--port",
        "0",
        "--teacher_dtype",
        "float32",
    ]
    with subprocess.Popen(words, cwd=REPO, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = next(found[1] for line in server.stdout if (found := re.search(r" at (http\S+)$", line.strip())))
            seconds = {"here": [], "there": []}
            for _ in range(2):
                here = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype="float32")
                losses = []
                for where, teacher in (("here", here), ("there", describe(TeacherArguments(teacher_url=url)))):
                    took, lost = train(folder, teacher, steps)
                    seconds[where] += took
                    losses.append(lost)
                assert losses[0] == losses[1], losses
        finally:
            server.terminate()
    here, there = (median(values) for values in seconds.values())
    width = SHAPES[shape]["hidden_size"]
    return f"| {shape} | {width} | {here:.3f} | {there:.3f} | {there / here:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["micro", "small"], default=["micro", "small"])
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    rows = [
        "| teacher | width | s a step, in the process | s a step, behind a server | ratio |",
        "|---|---|---|---|---|",
    ]
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(shape, Path(folder), args.steps))
        print(f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}", *rows, sep="\n", flush=True)


if __name__ == "__main__":
    main()
