"""Runs experiments/small_gpu_24gb.sh and small_gpu_16gb.sh in that much GPU memory: peak, tokens/s, seconds a step.

    python benchmarks/small_gpu.py
    python benchmarks/small_gpu.py --caps 16 --steps 6

Each script's command runs unchanged, on random weights in the shapes of Llama-3.2-1B and Llama-3.1-8B (16 GiB on disk,
in OUT/pair, deleted at the end; `--pair DIR` uses a pair that `random_pair.py` wrote, and keeps it) and on prompts that
give sequences of 1024 tokens. PyTorch may use 95 % of the 24 or 16 GiB, which leaves room for the CUDA context.

`student s` and `teacher s` are the mean seconds of steps with text by the student or the teacher, without the first step
and without capturing graphs. `--shape tiny` tries the commands without a GPU, with a teacher that is not quantized.
"""

import argparse
import json
import re
import shlex
import shutil
import statistics
import string
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from common import CUDA, REPO, Column, emit, parser, run_all, write
from random_pair import write_pair

from gkd.generation import static as static_decoding

GIB = 2**30
CAPS = (24, 16)
SHARE = 0.95
COLUMNS = [
    Column("run", "GiB"),
    Column("cap", "cap GiB", ".1f"),
    Column("peak_gib", "allocated GiB", ".2f"),
    Column("reserved_gib", "reserved GiB", ".2f"),
    Column("tokens_per_second", "scored tokens/s", ".0f"),
    Column("student_seconds", "student s", ".2f"),
    Column("teacher_seconds", "teacher s", ".2f"),
    Column("steps", "steps", "d"),
    Column("width", "tokens a row", "d"),
]
_TEMPLATE_TOKENS = 4  # of a question: three special tokens and a line feed
# Flags that make a command small enough for a test.
TINY = """--max_length 96 --max_new_tokens 8 --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --bf16 False
    --dtype float32 --teacher_dtype float32 --teacher_load_in_4bit False""".split()


def script_flags(script: Path, **variables: str) -> list[str]:
    """The flags of the one train_gkd.py command in a shell script, without "$@"."""
    lines = re.sub(r"\s*\\\n\s*", " ", script.read_text(encoding="utf-8")).splitlines()
    lines = [re.sub(r"\$\{\w+:\+(--[^}]*)\}", r"\1", line) for line in lines]  # as if the variable were set
    (line,) = [line for line in lines if "train_gkd.py --" in line and not line.startswith("#")]
    words = shlex.split(line.split("train_gkd.py", 1)[1])
    return [string.Template(word).substitute(variables) for word in words if word != "$@"]


def value_of(flags: list[str], name: str) -> int:
    """The last value of a flag on the command line, else its value in the file of --config."""
    if f"--{name}" not in flags:
        return yaml.safe_load(Path(flags[flags.index("--config") + 1]).read_text(encoding="utf-8"))[name]
    return int(flags[len(flags) - 1 - flags[::-1].index(f"--{name}") + 1])


def cap_memory(gib: float) -> None:
    """Limits this process's GPU memory, and makes the static decoder take that limit for the GPU's size."""
    if CUDA:
        torch.cuda.set_per_process_memory_fraction(min(1.0, SHARE * gib * GIB / torch.cuda.mem_get_info()[1]))
    static_decoding.device_memory = lambda device: gib * GIB


def write_rows(path: Path, prompt_tokens: int, count: int) -> None:
    """Writes distinct prompts of `prompt_tokens` tokens in their template; a token is a byte."""
    rows = []
    for number in range(count):
        text = f"{number} " + "one two three four " * prompt_tokens
        rows.append({"prompt": [{"role": "user", "content": text[: prompt_tokens - _TEMPLATE_TOKENS]}]})
    path.write_text(json.dumps(rows), encoding="utf-8")


def measure(cap: int, args: argparse.Namespace) -> None:
    """Runs one script's command in this process, and emits its row."""
    cap_memory(cap)
    import train_gkd

    out = Path(tempfile.mkdtemp(prefix="small-gpu-"))
    pair, data = Path(args.pair or args.out / "pair"), out / "prompts.json"
    places = {"STUDENT": pair / "student", "TEACHER": pair / "teacher", "DATA": data, "OUT": out / "run"}
    flags = script_flags(REPO / f"experiments/small_gpu_{cap}gb.sh", **{k: str(v) for k, v in places.items()})
    if args.shape == "tiny":
        flags += TINY
    flags += ["--max_steps", str(args.steps), "--logging_steps", "1", "--report_to", "none", "--save_strategy", "no"]
    flags += ["--disable_tqdm", "True"]
    batch = value_of(flags, "per_device_train_batch_size") * value_of(flags, "gradient_accumulation_steps")
    width = value_of(flags, "max_length")
    write_rows(data, width - value_of(flags, "max_new_tokens"), batch * args.steps)
    print(shlex.join(flags), flush=True)
    train_gkd.main(flags)
    state = json.loads((out / "run/trainer_state.json").read_text())
    shutil.rmtree(out)
    memory = {}
    if CUDA:
        memory["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        memory["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    emit(run=str(cap), cap=SHARE * cap, width=width, **memory, **figures(state["log_history"]))


def figures(history: list[dict]) -> dict:
    """Mean seconds by writer and scored tokens/s of the steps after the first, from a history with each step."""
    logs = [log for log in history if "loss" in log][1:]
    seconds = {"on_policy": [], "teacher": []}
    tokens = 0
    for log in logs:
        spent = log["seconds_generating"] + log["seconds_training"]
        tokens += round(log["tokens_per_second"] * (spent + log.get("seconds_capturing", 0.0)))  # counted
        seconds[next(source for source in seconds if f"{source}/loss" in log)].append(spent)
    row = {"steps": len(logs), "tokens_per_second": tokens / sum(map(sum, seconds.values()))}
    for source, name in (("on_policy", "student_seconds"), ("teacher", "teacher_seconds")):
        if seconds[source]:
            row[name] = statistics.mean(seconds[source])
    return row | {"logs": logs}


def main() -> None:
    arguments = parser(__doc__, "small_gpu", limit=150)
    arguments.add_argument("--caps", nargs="+", type=int, choices=CAPS, default=list(CAPS), metavar="GIB")
    arguments.add_argument("--steps", type=int, default=10)
    arguments.add_argument("--shape", choices=("llama", "tiny"), default="llama" if CUDA else "tiny")
    arguments.add_argument("--pair", type=Path, help="folder with `student` and `teacher`")
    args = arguments.parse_args()
    if args.steps < 2:
        arguments.error("--steps must be at least 2: the first is left out.")
    args.out = args.out.resolve()
    if args.variant:
        measure(int(args.variant), args)
        return
    pair = args.out / "pair"
    try:
        if args.pair is None:
            sizes = {"student": "tiny", "teacher": "tiny", "vocab_size": 2048}
            write_pair(pair, **(sizes if args.shape == "tiny" else {"student": "1b", "teacher": "8b"}))
            if CUDA:
                torch.cuda.empty_cache()
        rows = run_all([str(cap) for cap in args.caps], args, COLUMNS)
    finally:
        shutil.rmtree(pair, ignore_errors=True)
    for row in rows:
        if "failed" in row:
            tail = Path(row["log"]).read_text(errors="replace").splitlines()[-40:]
            print("\n".join([f"--- {row['log']} ends with", *tail]), file=sys.stderr)
    write(args, COLUMNS, rows)


if __name__ == "__main__":
    main()
