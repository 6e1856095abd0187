"""Seconds per optimizer step and peak memory: TRL's GKDTrainer, TRL's DistillationTrainer and gkd, side by side.

    python benchmarks/step_time.py --shape seed --runs stock:on_policy@4 distillation:on_policy gkd:on_policy \
        stock:off_policy gkd:off_policy stock:seq_kd@4 gkd:seq_kd@22 gkd:mix@20
    python benchmarks/step_time.py --shape long --runs stock:on_policy@2 distillation:on_policy@4 gkd:on_policy
    python benchmarks/step_time.py --steps 4 --runs equal64/gkd:on_policy tail64/gkd:on_policy
    python benchmarks/step_time.py --shape tail64 --steps 3 --runs gkd:on_policy distillation_vllm:on_policy
    python benchmarks/step_time.py --shape seed --ranks 2 --launcher ddp --runs gkd:on_policy gkd:off_policy
    python benchmarks/step_time.py --shape seed --repeat --runs gkd:on_policy gkd_compiled:off_policy
    python benchmarks/step_time.py --shape quickstart --runs stock:seq_kd gkd:seq_kd stock:mix gkd:mix
    python benchmarks/step_time.py --shape tiny --steps 3

A run is TRAINER:MODE, with SHAPE/ before it in place of `--shape`, with @STEPS behind it in place of `--steps`, and with
@STEPS@SECONDS in place of `--limit` too. The modes: `on_policy` (λ = 1), `off_policy` (λ = 0, the dataset's answers),
`seq_kd` (λ = 0, text by the teacher), and `mix` (λ = 0.5, the other half by the teacher). gkd's teacher writes text for
many steps at once, so the mean is the number to compare; `mix` then runs a second epoch over the same rows, in a separate
row, `mix_epoch2`. `mix_each_step` is gkd with `--teacher_text_cache off`, which writes each step's text in that step.

`gkd_compiled` is gkd with `--torch_compile`. DistillationTrainer supports only `on_policy`; `distillation` generates with
transformers, and `distillation_vllm` with a vLLM in its process, which takes `--vllm_memory` of the GPU. Without vLLM that
run is skipped.

In the shapes `tail64`, `tail256` and `tail4k` answers end anywhere: a small share of the ids are stop tokens, so that random
weights, which sample almost uniformly, write texts of geometric length. `padding` is the share of a step's tokens that are no
text. `equal64` has as many tokens as `tail64`, in rows of one length. `trained tokens/s` is the text of a step, prompts
included, by the seconds of its training: that of tail64 over that of equal64 is what lengths cost. With both runs in one
call the ratio stands below the table; from two tables, divide one column by the other. `qwen` and `full17` have Qwen2's
shapes, the second with full fine-tuning.

Shapes `seed` and `long` train a 1B student with LoRA on all linear layers and gradient checkpointing against an 8B
teacher; `quickstart` is a step of experiments/quickstart.py, full fine-tuning on the CPU, where a batch's prompts are
padded to 87 tokens on average. Models with random weights almost never stop by themselves, so all trainers write
completions of the same length; `tokens` is the number of scored tokens of a step.

`starting s` builds the trainer from models in memory, vLLM's engine included. `first s` includes one-off work (captured
graphs, compiled kernels), `first - median s` is how long that takes. `--repeat` starts each run twice: the first finds no
compiled kernel on disk, the second those of the first. Peak memory is measured after the first step.

The floor: each weight and the cache of rows that have not ended are read once for each decoded token, and the matrix
products that no implementation can avoid (no recomputation, head only at scored positions) run at the rates in
common.py, or as measured on the CPU.

`--ranks N` starts each run in N processes, a GPU each, by ds_configs/zero2.yaml, or the file that `--launcher` names. Each
has the rows of the shape, so a step has N times as many. Without a GPU, `--launcher ddp` runs over gloo.
"""

import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import vllm_peer
from common import CUDA, REPO, Column, emit, leave, parser, rates, run_all, synchronize, write
from random_pair import BASE
from steps import STEP_SHAPES, Clock, Run, Shape, build, floor, models

from gkd.models.packing import padded_length

LAUNCHERS = ("ddp", "zero2", "fsdp2")
COLUMNS = [
    Column("run", "run"),
    Column("starting", "starting s", ".1f"),
    Column("first", "first s", ".2f"),
    Column("first_extra", "first - median s", ".2f"),
    Column("median", "median s", ".3f"),
    Column("mean", "mean s with first", ".3f"),
    Column("capturing", "capturing s, once", ".2f"),
    Column("generating", "generating s", ".3f"),
    Column("training", "training s", ".3f"),
    Column("peak_gib", "peak GiB", ".2f"),
    Column("reserved_gib", "reserved GiB", ".2f"),
    Column("tokens", "tokens", ".0f"),
    Column("padding", "padding", ".1%"),
    Column("tokens_per_second", "tokens/s", ".0f"),
    Column("trained_per_second", "trained tokens/s", ".0f"),
    Column("floor", "floor s", ".3f"),
    Column("above_floor", "median / floor", ".1f"),
]


def count_tokens(trainer) -> list[tuple[int, torch.Tensor]]:
    """A list that collects each micro-batch's step, and how many of its tokens are scored, are text, and are in all."""
    counts, compute_loss = [], trainer.compute_loss

    def counting(model, inputs, *args, **kwargs):
        ids = inputs["input_ids"] if "input_ids" in inputs else inputs["completion_ids"]
        scored = inputs["labels"][:, 1:] != -100 if "labels" in inputs else inputs["completion_mask"]
        text = (ids != BASE["pad_token_id"]).sum()
        computed = ids.numel()
        if "lengths" in inputs and trainer.student.packs:
            computed = padded_length(int(inputs["lengths"].sum()))
        counts.append((trainer.state.global_step, torch.stack([scored.sum(), text, text.new_tensor(computed)])))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = counting
    return counts


def measured(run: Run, shape: Shape, ranks: int = 1, memory: float = 0.35) -> list[dict]:
    """Trains, and returns a row of numbers for each epoch; none on other ranks than the first.

    `memory`: the share of the GPU that vLLM takes.
    """
    if CUDA:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    pair = models(run.trainer, shape)
    synchronize()
    started = time.perf_counter()
    trainer = build(run, shape, str(Path(tempfile.gettempdir(), "step_time")), ranks, pair, memory)
    if trainer.accelerator.num_processes != ranks:
        raise RuntimeError(f"{trainer.accelerator.num_processes} processes were started for {ranks} ranks.")
    synchronize()
    starting = time.perf_counter() - started
    clock = Clock()
    trainer.add_callback(clock)
    counts = count_tokens(trainer)
    trainer.train()
    of_steps = [sum(count for at, count in counts if at == step) for step in range(len(clock.seconds))]
    tokens, text, everything = trainer.accelerator.reduce(torch.stack(of_steps, 1).float(), reduction="sum").tolist()
    history = [log for log in trainer.state.log_history if "loss" in log]
    rows = []
    for epoch in range(run.epochs):
        part = slice(epoch * run.steps, (epoch + 1) * run.steps)
        seconds, logs = clock.seconds[part], history[part]
        later = slice(0 if epoch else 1, None)  # the very first step includes one-off work
        row = {
            "mode": run.mode if epoch == 0 else f"{run.mode}_epoch{epoch + 1}",
            "first": seconds[0],
            "median": statistics.median(seconds[later]),
            "mean": statistics.mean(seconds),
            **({} if epoch else {"starting": starting, "first_extra": seconds[0] - statistics.median(seconds[later])}),
            "tokens": statistics.mean(tokens[part]),
            "padding": 1 - sum(text[part]) / sum(everything[part]),
            "tokens_per_second": sum(tokens[part][later]) / sum(seconds[later]),
            "seconds": seconds,
            "logs": logs,
        }
        for phase in ("generating", "training"):
            if f"seconds_{phase}" in logs[-1]:
                row[phase] = statistics.mean(log[f"seconds_{phase}"] for log in logs[later])
        if "training" in row:
            row["trained_per_second"] = statistics.mean(text[part][later]) / row["training"]
        if any("seconds_capturing" in log for log in logs):
            row["capturing"] = sum(log.get("seconds_capturing", 0.0) for log in logs)
        if CUDA:
            row["weights_gib"] = clock.weights / 2**30
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            row["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        rows.append(row)
    return rows if trainer.is_world_process_zero() else []


def mix_notes(rows: list[dict]) -> list[str]:
    """The seconds of 20 steps of the mix, measured or derived from its two halves."""
    by_run = {(row["shape"], row["trainer"], row["mode"]): row for row in rows if "failed" not in row}
    notes = []
    for shape, trainer in dict.fromkeys(run[:2] for run in by_run):
        name = f"{shape}, {trainer}"
        for mode in ("mix", "mix_each_step", "mix_epoch2"):
            if row := by_run.get((shape, trainer, mode)):
                total = row["first"] + 19 * statistics.mean(row["seconds"][1:])
                notes.append(f"{name}, 20 steps of {mode}: {total:.1f} s, the first included.")
        halves = [by_run.get((shape, trainer, mode)) for mode in ("on_policy", "seq_kd")]
        if all(halves) and (shape, trainer, "mix") not in by_run:
            total = sum(10 * row["median"] for row in halves)
            notes.append(f"{name}, 20 steps of the mix: {total:.1f} s, derived: 10 medians of each half.")
    return notes


def tail_notes(rows: list[dict]) -> list[str]:
    """How fast rows of many lengths train, beside as many tokens in rows of one length."""
    speeds = {
        (row["shape"], f"{row['trainer']}:{row['mode']}"): row["trained_per_second"]
        for row in rows
        if row.get("training")
    }
    return [
        f"{run}: a token of tail64 trains at {speed / speeds['equal64', run]:.1%} of the speed of equal64's."
        for (shape, run), speed in speeds.items()
        if shape == "tail64" and ("equal64", run) in speeds
    ]


def launcher_of(ranks: int, config: str, port: int) -> list[str]:
    """The words that start so many processes: by a file of ds_configs, or on the CPU, where DDP needs none, by torchrun."""
    if CUDA:
        words = ["accelerate.commands.launch", "--config_file", str(REPO / f"ds_configs/{config}.yaml")]
        return ["-m", *words, "--num_processes", str(ranks), "--main_process_port", str(port)]
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(port)]


def measure(args) -> None:
    """Emits the rows of the run that `--variant` names, in this process."""
    run, ranks = Run.parse(args.variant, args.steps, args.shape), args.ranks or 1
    if run.trainer == "distillation_vllm":
        if vllm_peer.MISSING:
            emit(run=args.variant, failed=vllm_peer.MISSING)
            return
        vllm_peer.settle_environment()
    for row in measured(run, STEP_SHAPES[run.shape], ranks, args.vllm_memory):
        name = args.variant.replace(run.mode, row["mode"], 1)
        emit(run=name, shape=run.shape, trainer=run.trainer, ranks=ranks, **row)
    if ranks > 1 or run.trainer == "distillation_vllm":
        leave()


def main() -> None:
    arguments = parser(__doc__, "step_time", limit=600)
    arguments.add_argument("--shape", choices=STEP_SHAPES, default="tiny", help="of runs that name none")
    default = ["stock:on_policy", "distillation:on_policy", "gkd:on_policy", "stock:off_policy", "gkd:off_policy"]
    arguments.add_argument("--runs", nargs="+", default=default, metavar="[SHAPE/]TRAINER:MODE[@STEPS[@SECONDS]]")
    arguments.add_argument("--steps", type=int, default=8)
    arguments.add_argument("--repeat", action="store_true", help="start each run twice, at first with empty caches")
    arguments.add_argument("--ranks", type=int, help="processes of a run, a GPU each")
    arguments.add_argument("--launcher", choices=LAUNCHERS, default="zero2", help="the file of ds_configs for --ranks")
    arguments.add_argument("--vllm_memory", type=float, default=0.35, help="share of the GPU that vLLM takes")
    args = arguments.parse_args()
    if args.variant:
        measure(args)
        return
    runs = {}
    for text in args.runs:
        try:
            runs[text] = Run.parse(text, args.steps, args.shape)
        except ValueError as error:
            arguments.error(f"{text}: {error}")
        if problem := runs[text].problem():
            arguments.error(f"{text}: {problem}")
    if args.ranks and CUDA and args.ranks > torch.cuda.device_count():
        arguments.error(f"--ranks {args.ranks}: there are {torch.cuda.device_count()} GPUs.")
    if args.ranks and not CUDA and args.launcher != "ddp":
        arguments.error(f"--launcher {args.launcher} needs GPUs: take ddp.")
    columns = [COLUMNS[0], COLUMNS[1], Column("start", "start", "d"), *COLUMNS[2:]] if args.repeat else COLUMNS
    speeds = rates()

    def finish(rows: list[dict], show: bool = False) -> None:
        for row in rows:
            if "failed" not in row:
                row["floor"] = floor(STEP_SHAPES[row["shape"]], row["mode"], *speeds)
                row["above_floor"] = row["median"] / row["floor"]
        write(args, columns, rows, [] if args.repeat else [*mix_notes(rows), *tail_notes(rows)], show)

    launcher = partial(launcher_of, args.ranks, args.launcher) if args.ranks else lambda port: []
    limits = {text: run.limit for text, run in runs.items()}
    finish(
        run_all(list(runs), args, columns, args.ranks or 1, launcher, limits, 2 if args.repeat else 1, finish),
        show=True,
    )


if __name__ == "__main__":
    main()
