"""Seconds of a training step by where the teacher is: beside the student, on another GPU, over two, or behind `gkd serve`.

    python benchmarks/served.py
    python benchmarks/served.py --runs seed:here:off_policy seed:device:off_policy seed:server:off_policy
    python benchmarks/served.py --runs long32:spread:off_policy long32:server2:off_policy

A run is SHAPE:PLACE:MODE, shapes and modes those of step_time.py; `long32` is `long` with a teacher of 32B. The student is on
the first GPU. Places: `here`, beside it; `device`, on the second GPU; `spread`, its layers over both; `server`, in a server's
process on the second GPU; `server2`, in one on both. Models have random weights; `loss off` is the largest difference of a
step's loss from that of the first run with its shape and mode. `MB a step` are the hidden states that a server sends, over
the loopback of this machine, which costs next to nothing: see docs/teachers.md for networks. On a CPU a server computes on
the same cores.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from argparse import SUPPRESS
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import uvicorn
from common import CUDA, DTYPE, Column, emit, parser, run_all, write
from random_pair import SHAPES, tokenizer
from steps import MODES, STEP_SHAPES, Clock, Shape, ending_model, lora, rows_of, settings

from gkd.cli import serve as serve_command
from gkd.config.serving import ServeArguments
from gkd.config.teacher import TeacherArguments
from gkd.config.training import GKDArguments
from gkd.models.loading import freeze
from gkd.models.pairing import Side
from gkd.teachers import describe
from gkd.training.trainer import GKDTrainer

ALL = STEP_SHAPES | {"long32": replace(STEP_SHAPES["long"], teacher=SHAPES["32b"])}
DEVICES = {
    "here": None,
    "device": "cuda:1" if CUDA else "cpu",
    "spread": "cuda:0,cuda:1",
    "server": None,
    "server2": None,
}
# The GPUs that a server sees, and --teacher_device there.
SERVERS = {"server": ("1", None), "server2": ("1,0", "cuda:0,cuda:1")}
ADDRESS = "serves at "
COLUMNS = [
    Column("run", "run"),
    Column("first", "first s", ".2f"),
    Column("median", "median s", ".3f"),
    Column("generating", "generating s", ".3f"),
    Column("training", "training s", ".3f"),
    Column("peak_gib", "peak GiB on the student's GPU, its process", ".2f"),
    Column("sent", "MB a step", ".1f"),
    Column("off", "loss off", ".1e"),
]


def teacher_of(shape: Shape):
    return freeze(ending_model(shape.teacher, 1, shape.hazard))


def serve(shape: Shape, devices: str | None) -> None:
    """What `gkd serve` does, for a teacher with random weights."""
    args = ServeArguments(teacher_model_name_or_path="random", port=0, max_request_mib=64, teacher_device=devices)
    model = teacher_of(shape)
    with tempfile.TemporaryDirectory() as folder:
        server = serve_command.server_of(args, model, Side.of_model(model, tokenizer()), "random", Path(folder), None)
        if CUDA:
            torch.cuda.empty_cache()  # where the whole was made
        listening = serve_command.listen(args)
        print(f"{ADDRESS}http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(server.app, log_level="warning")).run(sockets=[listening])


@contextmanager
def server_of(name: str, place: str) -> Iterator[str]:
    """The address of a server in a process of its own."""
    gpus, devices = SERVERS[place]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    own = {"CUDA_VISIBLE_DEVICES": ",".join(visible[int(gpu)] for gpu in gpus.split(","))} if CUDA else {}
    words = [sys.executable, __file__, "--serve", name, *(["--devices", devices] if devices else [])]
    with subprocess.Popen(words, env=os.environ | own, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                if line.startswith(ADDRESS):
                    break
            else:
                raise RuntimeError("the server did not start")
            yield line.removeprefix(ADDRESS).strip()
        finally:
            process.terminate()


def train(name: str, place: str, mode: str, steps: int) -> dict:
    """The numbers of a row."""
    shape = ALL[name]
    with tempfile.TemporaryDirectory() as folder, server_of(name, place) if place in SERVERS else nullcontext() as url:
        teacher = describe(TeacherArguments(teacher_url=url)) if url else teacher_of(shape)
        student = ending_model(shape.student, 0, shape.hazard)
        limits = {"max_new_tokens": shape.new, "max_length": shape.prompt + shape.new + 16}
        limits |= {"lmbda": MODES[mode][0], "teacher_device": DEVICES[place]}
        args = GKDArguments(**limits, **settings(shape, folder, steps))
        rows = rows_of(shape, shape.batch * shape.accumulation * steps)
        more = {"processing_class": tokenizer(), "peft_config": lora(shape)}
        trainer = GKDTrainer(student, teacher, args, train_dataset=rows, **more)
        clock = Clock()
        trainer.add_callback(clock)
        if CUDA:
            torch.cuda.empty_cache()
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    first, *later = clock.seconds
    row = {"first": first, "median": statistics.median(later), "seconds": clock.seconds}
    row |= {part: statistics.median(log[f"seconds_{part}"] for log in logs[1:]) for part in ("generating", "training")}
    if CUDA:
        row["peak_gib"] = torch.cuda.max_memory_allocated(0) / 2**30
    if url:
        tokens = shape.batch * shape.accumulation * shape.mean_new
        row["sent"] = tokens * shape.teacher["hidden_size"] * DTYPE.itemsize / 1e6
    return row | {"losses": [log["loss"] for log in logs]}


def compare(rows: list[dict]) -> None:
    """Adds how far losses are from those of the first run of a shape and mode."""
    first: dict = {}
    for row in rows:
        if "losses" in row:
            name, _, mode = row["run"].split(":")
            wanted = first.setdefault((name, mode), row["losses"])
            row["off"] = max(abs(one - other) for one, other in zip(row["losses"], wanted, strict=True))


def main() -> None:
    arguments = parser(__doc__, "served", limit=600)
    default = [f"tiny:{place}:off_policy" for place in ("here", "server")]
    arguments.add_argument("--runs", nargs="+", default=default, metavar="SHAPE:PLACE:MODE")
    arguments.add_argument("--steps", type=int, default=8)
    arguments.add_argument("--serve", help=SUPPRESS)
    arguments.add_argument("--devices", help=SUPPRESS)
    args = arguments.parse_args()
    if args.serve:
        serve(ALL[args.serve], args.devices)
        return
    if args.variant:
        emit(run=args.variant, **train(*args.variant.split(":"), args.steps))
        return
    for run in args.runs:
        name, place, mode = [*run.split(":"), "", ""][:3]
        if name not in ALL or place not in DEVICES or mode not in MODES:
            arguments.error(
                f"{run}: shapes are {', '.join(ALL)}, places {', '.join(DEVICES)}, modes {', '.join(MODES)}."
            )
    rows = run_all(args.runs, args, COLUMNS, 2 if CUDA else 1)
    compare(rows)
    write(args, COLUMNS, rows)


if __name__ == "__main__":
    main()
