"""Growth of gkd's cost with the length of completions and with the vocabulary.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --plot runs/scaling/scaling.json      # only the picture, on any machine

Each point trains a few steps on text of the dataset (λ = 0; a 1B student with LoRA and gradient checkpointing, an 8B
teacher, batch 2 × 2 accumulated on a GPU). One process measures the lengths, another the vocabularies, for which the
divergence of one micro-batch is also timed separately. Writes a table, and scaling.png with logarithmic axes, where the
dashed line is proportional growth from the first point. Memory is measured above the weights of both models.

The floor of a step is that of step_time.py.
"""

import gc
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from common import CUDA, Column, emit, parser, rates, run_all, timed, write
from divergence import ROUNDS, WARM_UPS, Case, Inputs
from pictures import draw
from random_pair import SHAPES
from step_time import measured
from steps import STEP_SHAPES, Run, Shape, floor

if CUDA:
    LENGTHS, VOCABULARIES = [128 * 2**i for i in range(6)], [32768 * 2**i for i in range(4)]
    START = Shape(SHAPES["1b"], SHAPES["8b"], batch=2, accumulation=2, prompt=64, new=512)
else:
    LENGTHS, VOCABULARIES = [8, 32], [512, 2048]
    START = replace(STEP_SHAPES["tiny"], new=16)
POINTS = [f"length:{length}" for length in LENGTHS] + [f"vocabulary:{size}" for size in VOCABULARIES]
COLUMNS = [
    Column("run", "point"),
    Column("median", "s a step", ".3f"),
    Column("floor", "floor s", ".3f"),
    Column("above_floor", "s / floor", ".1f"),
    Column("tokens", "scored tokens", ".0f"),
    Column("tokens_per_second", "tokens/s", ".0f"),
    Column("peak_gib", "peak GiB", ".2f"),
    Column("above_weights_gib", "above weights GiB", ".2f"),
    Column("divergence_ms", "divergence ms", ".2f"),
    Column("divergence_gib", "divergence GiB", ".2f"),
]


def shape_of(point: str) -> Shape:
    axis, value = point.split(":")
    if axis == "length":
        return replace(START, new=int(value))
    student, teacher = (model | {"vocab_size": int(value)} for model in (START.student, START.teacher))
    return replace(START, student=student, teacher=teacher)


def divergence(shape: Shape) -> dict[str, float]:
    """Milliseconds of gkd's divergence over one micro-batch, forward and backward, and GiB above the inputs."""
    hidden = (model["hidden_size"] for model in (shape.student, shape.teacher))
    inputs = Inputs(Case(shape.batch * shape.new, *hidden, shape.student["vocab_size"], beta=0.5))
    for _ in range(WARM_UPS):
        inputs.step(Inputs.gkd)
    row = {"divergence_ms": 1000 * statistics.median(timed(lambda: inputs.step(Inputs.gkd)) for _ in range(ROUNDS))}
    if CUDA:
        inputs.hidden.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        inputs.step(Inputs.gkd)
        row["divergence_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return row


def measure(point: str, steps: int) -> None:
    gc.collect()  # frees the previous point
    axis, value = point.split(":")
    shape = shape_of(point)
    row = divergence(shape) if axis == "vocabulary" else {}
    if CUDA:
        torch.cuda.empty_cache()
    row |= measured(Run("gkd", "off_policy", steps), shape)[0]
    if CUDA:
        row["above_weights_gib"] = row["peak_gib"] - row["weights_gib"]
    emit(run=point, axis=axis, value=int(value), **row)


def growth(rows: list[dict]) -> list[str]:
    """The exponent of each cost between the last two points of an axis: 1 is proportional, 0 constant."""
    notes = []
    for axis in ("length", "vocabulary"):
        last = [row for row in rows if row.get("axis") == axis][-2:]
        for key, title in (("median", "seconds"), ("above_weights_gib", "memory"), ("divergence_ms", "divergence")):
            if len(last) == 2 and all(row.get(key, 0) > 0 for row in last):
                a, b = last
                exponent = math.log(b[key] / a[key]) / math.log(b["value"] / a["value"])
                notes.append(f"{title} from {axis} {a['value']} to {b['value']}: exponent {exponent:.2f}.")
    return notes


def plot(rows: list[dict], path: Path) -> None:
    """Up to four panels: seconds and memory over length and vocabulary."""
    panels = []
    for axis, x_title in (("length", "tokens of a completion"), ("vocabulary", "vocabulary")):
        points = [row for row in rows if row.get("axis") == axis]
        for y_title, keys in (
            ("seconds", {"median": ("a step", 1), "divergence_ms": ("divergence of a micro-batch", 1e-3)}),
            ("GiB", {"above_weights_gib": ("a step, above the weights", 1), "divergence_gib": ("divergence", 1)}),
        ):
            lines = {
                label: ([p["value"] for p in points if key in p], [p[key] * unit for p in points if key in p])
                for key, (label, unit) in keys.items()
            }
            panels.append((x_title, y_title, lines))
    draw(panels, path)
    print(path)


def main() -> None:
    arguments = parser(__doc__, "scaling", limit=300)
    arguments.add_argument("--points", nargs="+", choices=POINTS, default=POINTS, metavar="AXIS:VALUE")
    arguments.add_argument("--steps", type=int, default=6)
    arguments.add_argument("--plot", type=Path, metavar="FILE.json", help="draw the picture of a file again")
    args = arguments.parse_args()
    if args.plot:
        plot(json.loads(args.plot.read_text())["rows"], args.plot.with_suffix(".png"))
        return
    if args.variant:
        for point in args.points:
            if point.startswith(args.variant):
                measure(point, args.steps)
        return
    rows = run_all(list(dict.fromkeys(point.split(":")[0] for point in args.points)), args, COLUMNS)
    speeds = rates()
    for row in rows:
        if "failed" not in row:
            row["floor"] = floor(shape_of(row["run"]), "off_policy", *speeds)
            row["above_floor"] = row["median"] / row["floor"]
    write(args, COLUMNS, rows, growth(rows))
    plot(rows, args.out / "scaling.png")


if __name__ == "__main__":
    main()
