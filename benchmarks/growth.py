"""Growth of a step's seconds and memory with the number of rows, and with the cap on a completion's length.

    python benchmarks/growth.py --total 590                     # all points, cheapest first, as far as 590 seconds reach
    python benchmarks/growth.py --points rows:1024 full:16384 --out runs/growth-2
    python benchmarks/growth.py --plot runs/growth/growth.json  # only the picture, on any machine

gkd trains on the student's own text (λ = 1, β = 1; a 1B student with LoRA, an 8B teacher, prompts of 256 tokens). At
`rows:N` a step has N rows with a cap of 1024 tokens, at `cap:N` 64 rows with a cap of N: a small share of the ids end a
text, so that completions have 300 tokens on average, less what the cap cuts. At `full:N` 16 rows all reach a cap of N.

Each point is a process with a time limit of its own. The table and the picture are written anew whenever one ends, so a call
that is cut off, or runs into `--total`, leaves both for what it reached. Seconds are those of the last of the `steps` of a
point: with one step, what compiles once is among them. Capturing CUDA graphs is not; it stands apart, summed over all steps.
`generation GiB` is the peak until the first text is written, `step GiB` that of all steps, both with the models' weights.

`decoder` is `static`, or `dynamic` where the static one fell back. `together` is how many rows generate at a time: the fewest
of `--generation_batch_size`, what the cache may take of the GPU, and, after running out of memory, half as many, again and
again. `memory made it` lists what a run chose after running out of memory. If that was no help, the row says so.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NamedTuple

import torch
from common import CUDA, DEVICE, Column, emit, parser, rates, run_all, write
from pictures import draw
from random_pair import SHAPES
from steps import STEP_SHAPES, Clock, Run, Shape, build, floor, models

from gkd.generation.static import rows_that_fit
from gkd.io.errors import RunStopped, first_line
from gkd.runs.choices import GENERATION_ROWS, MICRO_ROWS, SPARE_MEMORY


class Point(NamedTuple):
    """A step of `rows` rows with completions of at most `cap` tokens, which end at each with probability `hazard`.

    `limit`: seconds that the process may take.
    """

    rows: int
    cap: int
    hazard: float
    steps: int
    limit: int


if CUDA:
    WINDOW = {"max_position_embeddings": 32768}
    START = replace(STEP_SHAPES["tail64"], student=SHAPES["1b"] | WINDOW, teacher=SHAPES["8b"] | WINDOW)
    SOME_ROWS, CAP, MEAN = 64, 1024, 300
    POINTS = {  # cheapest first
        "rows:16": Point(16, CAP, 1 / MEAN, steps=3, limit=90),
        "cap:512": Point(SOME_ROWS, 512, 1 / MEAN, steps=3, limit=90),
        "rows:64": Point(64, CAP, 1 / MEAN, steps=3, limit=100),
        "cap:2048": Point(SOME_ROWS, 2048, 1 / MEAN, steps=3, limit=120),
        "cap:4096": Point(SOME_ROWS, 4096, 1 / MEAN, steps=2, limit=120),
        "rows:256": Point(256, CAP, 1 / MEAN, steps=2, limit=150),
        "cap:16384": Point(SOME_ROWS, 16384, 1 / MEAN, steps=2, limit=180),
        "rows:1024": Point(1024, CAP, 1 / MEAN, steps=2, limit=240),
        "full:16384": Point(16, 16384, 0.0, steps=1, limit=280),
    }
else:
    START = replace(STEP_SHAPES["tiny"], new=8)
    SOME_ROWS, CAP = 4, 8
    POINTS = {
        "rows:2": Point(2, CAP, 1 / 4, steps=2, limit=100),
        "rows:4": Point(SOME_ROWS, CAP, 1 / 4, steps=2, limit=100),
        "cap:16": Point(SOME_ROWS, 16, 1 / 4, steps=2, limit=100),
        "full:32": Point(4, 32, 0.0, steps=1, limit=100),
    }
COLUMNS = [
    Column("run", "point"),
    Column("generating", "generation s", ".2f"),
    Column("training", "training s", ".2f"),
    Column("step", "step s", ".2f"),
    Column("steps", "steps", "d"),
    Column("capturing", "capturing s, once", ".2f"),
    Column("mean_new", "mean length", ".0f"),
    Column("tokens_per_second", "tokens/s", ".0f"),
    Column("generation_gib", "generation GiB", ".2f"),
    Column("step_gib", "step GiB", ".2f"),
    Column("weights_gib", "weights GiB", ".2f"),
    Column("decoder", "decoder"),
    Column("together", "together", "d"),
    Column("choices", "memory made it"),
    Column("floor", "floor s", ".2f"),
    Column("above_floor", "step / floor", ".1f"),
]


def shape_of(point: Point) -> Shape:
    batch = min(START.batch, point.rows) if point.hazard else 2  # long rows leave no room for many
    accumulation = point.rows // batch
    return replace(START, batch=batch, accumulation=accumulation, new=point.cap, hazard=point.hazard)


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30


def watch_first_generation(trainer: Any, row: dict[str, Any]) -> None:
    """Puts the peak memory until the first text is written into `row`; without a reset, by which the decoder would choose."""
    enter = trainer.phases.enter

    def entering(phase: str | None) -> None:
        if phase == "training" and CUDA:
            row.setdefault("generation_gib", peak_gib())
        enter(phase)

    trainer.phases.enter = entering


def measure(name: str) -> None:
    point = POINTS[name]
    shape = shape_of(point)
    run = Run("gkd", "on_policy", point.steps)
    trainer = build(run, shape, str(Path(gettempdir(), "growth")), 1, models(run.trainer, shape))
    config = trainer.generation_config
    if not point.hazard:
        config.eos_token_id = []  # of so many tokens one would be a stop token by chance
    clock = Clock(counts=True)
    trainer.add_callback(clock)
    row: dict[str, Any] = {}
    watch_first_generation(trainer, row)
    try:
        trainer.train()
    except (RunStopped, torch.OutOfMemoryError) as error:
        emit(run=name, failed=first_line(error), **row, **memory_choices(trainer, shape))
        return
    *_, log = [log for log in trainer.state.log_history if "loss" in log]
    seconds = {phase: log[f"seconds_{phase}"] for phase in ("generating", "training")}
    step = sum(seconds.values())
    if CUDA:
        row |= {"step_gib": peak_gib(), "weights_gib": clock.weights / 2**30}
    tokens = round(log["tokens_per_second"] * (step + log.get("seconds_capturing", 0.0)))  # counted, logged as a rate
    row |= seconds | {
        "step": step,
        "steps": point.steps,
        "seconds": clock.seconds,
        "capturing": sum(log.get("seconds_capturing", 0.0) for log in trainer.state.log_history),
        "mean_new": tokens / point.rows,
        "tokens_per_second": tokens / step,
        "rows": point.rows,
        "cap": point.cap,
        "hazard": point.hazard,
    }
    emit(run=name, **row, **memory_choices(trainer, shape))


def memory_choices(trainer: Any, shape: Shape) -> dict[str, Any]:
    """How the student's text is decoded by now, how many rows together, and what running out of memory led to."""
    model, device = trainer.accelerator.unwrap_model(trainer.model), torch.device(DEVICE)
    static = trainer.generator.is_static(model, torch.empty(0, device=device), trainer.generation_config)
    values = {key: trainer.choices.get(key) for key in (GENERATION_ROWS, MICRO_ROWS, SPARE_MEMORY)}
    values = {key: value for key, value in values.items() if value is not None}
    fit = rows_that_fit(model, shape.prompt + shape.new, device)
    rows = shape.batch * shape.accumulation
    return {
        "decoder": "static" if static else "dynamic",
        "together": min(rows, trainer.args.generation_batch_size, fit, values.get(GENERATION_ROWS, rows)),
        "choices": ", ".join(f"{key} {value}" for key, value in values.items()) or None,
    }


def growth(rows: list[dict]) -> list[str]:
    """The exponent of each cost between the first and the last point of an axis: 1 is proportional, 0 constant."""
    notes = []
    for axis in ("rows", "cap"):
        points = along(axis, rows)
        for key, title in (("generating", "generation"), ("training", "training"), ("step_gib", "memory")):
            there = [point for point in points if point.get(key, 0) > 0]
            if len(there) > 1:
                a, b = there[0], there[-1]
                exponent = math.log(b[key] / a[key]) / math.log(b[axis] / a[axis])
                notes.append(f"{title} from {axis} {a[axis]} to {b[axis]}: exponent {exponent:.2f}.")
    return notes


def along(axis: str, rows: list[dict]) -> list[dict]:
    """The points with a mean of lengths that differ in `axis` alone, in its order."""
    other, value = {"rows": ("cap", CAP), "cap": ("rows", SOME_ROWS)}[axis]
    points = [row for row in rows if "failed" not in row and row["hazard"] and row[other] == value]
    return sorted(points, key=lambda row: row[axis])


def plot(rows: list[dict], path: Path) -> None:
    panels = []
    for axis, x_title in (("rows", "rows of a step"), ("cap", "cap on a completion's tokens")):
        points = along(axis, rows)
        for y_title, keys in (
            ("seconds", {"generating": "generation", "training": "training", "step": "step"}),
            ("GiB", {"generation_gib": "generation", "step_gib": "step", "weights_gib": "weights"}),
        ):
            lines = {
                label: ([point[axis] for point in points if key in point], [p[key] for p in points if key in p])
                for key, label in keys.items()
            }
            panels.append((x_title, y_title, lines))
    draw(panels, path)


def main() -> None:
    arguments = parser(__doc__, "growth", limit=0)
    arguments.add_argument("--points", nargs="+", choices=POINTS, default=list(POINTS), metavar="AXIS:VALUE")
    arguments.add_argument("--plot", type=Path, metavar="FILE.json", help="draw the picture of a file again")
    args = arguments.parse_args()
    if args.plot:
        plot(json.loads(args.plot.read_text())["rows"], args.plot.with_suffix(".png"))
        return
    if args.variant:
        measure(args.variant)
        return
    speeds = rates()

    def finish(rows: list[dict], show: bool = False) -> None:
        for row in rows:
            if "failed" not in row:
                row["floor"] = floor(shape_of(POINTS[row["run"]]), "on_policy", *speeds)
                row["above_floor"] = row["step"] / row["floor"]
        write(args, COLUMNS, rows, growth(rows), show)
        plot(rows, args.out / "growth.png")

    limits = {name: args.limit or point.limit for name, point in POINTS.items()}
    points = [name for name in POINTS if name in args.points]  # cheapest first, in whatever order they are named
    finish(run_all(points, args, COLUMNS, limits=limits, done=finish), show=True)


if __name__ == "__main__":
    main()
