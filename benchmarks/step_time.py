"""Seconds per optimizer step and peak memory: TRL's GKDTrainer, TRL's DistillationTrainer and gkd, side by side.

    python benchmarks/step_time.py --shape seed --runs stock:on_policy@4 distillation:on_policy gkd:on_policy \
        stock:off_policy gkd:off_policy stock:seq_kd@4 gkd:seq_kd@22 gkd:mix@20
    python benchmarks/step_time.py --shape long --runs stock:on_policy@2 distillation:on_policy@4 gkd:on_policy
    python benchmarks/step_time.py --shape tail64 --steps 4 --runs gkd:on_policy
    python benchmarks/step_time.py --shape seed --ranks 2 --runs gkd:mix@20 gkd:off_policy
    python benchmarks/step_time.py --shape quickstart --runs stock:seq_kd gkd:seq_kd stock:mix gkd:mix
    python benchmarks/step_time.py --shape tiny --steps 3

A run is TRAINER:MODE, with @STEPS in place of `--steps`. The modes: `on_policy` (λ = 1), `off_policy` (λ = 0, the
dataset's answers), `seq_kd` (λ = 0, text by the teacher), and `mix` (λ = 0.5, the other half by the teacher). gkd's
teacher writes text for many steps at once, so the mean is the number to compare; `mix` then runs a second epoch over the
same rows, in a separate row, `mix_epoch2`. `mix_each_step` is gkd with `--teacher_text_cache off`, which writes each
step's text in that step. `gkd_compiled` is gkd with `--torch_compile`. DistillationTrainer supports only `on_policy`, and
generates with transformers here.

In the shapes `tail64`, `tail256` and `tail4k` answers end anywhere: a small share of the ids are stop tokens, so that random
weights, which sample almost uniformly, write texts of geometric length. `padding` is the share of a step's tokens that are no
text. `qwen` and `full17` have Qwen2's shapes, the second with full fine-tuning.

Shapes `seed` and `long` train a 1B student with LoRA on all linear layers and gradient checkpointing against an 8B
teacher; `quickstart` is a step of experiments/quickstart.py, full fine-tuning on the CPU, where a batch's prompts are
padded to 87 tokens on average. Models with random weights almost never stop by themselves, so all trainers write
completions of the same length; `tokens` is the number of scored tokens of a step. `first s` includes one-off work
(captured graphs, compiled kernels). Peak memory is measured after the first step.

The floor: each weight and the cache of rows that have not ended are read once for each decoded token, and the matrix
products that no implementation can avoid (no recomputation, head only at scored positions) run at the rates in
common.py, or as measured on the CPU.

`--ranks N` launches each run with ds_configs/zero2.yaml on N GPUs.
"""

import os
import random
import statistics
import string
import tempfile
import time
from dataclasses import dataclass

import torch
from common import (
    CUDA,
    REPO,
    Column,
    decode_floor,
    emit,
    live_shares,
    parser,
    random_model,
    rates,
    run_all,
    stop_ids,
    synchronize,
    weights,
    write,
)
from datasets import Dataset
from peft import LoraConfig
from random_pair import BASE, SHAPES, tokenizer
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from gkd.compat import GKDConfig, StockGKDTrainer
from gkd.config.training import GKDArguments
from gkd.models.packing import padded_length
from gkd.training.trainer import GKDTrainer

SMOL = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip


@dataclass
class Shape:
    """A step of `accumulation` micro-batches of `batch` rows on a device, with `prompt` and `new` tokens."""

    student: dict
    teacher: dict
    batch: int
    accumulation: int
    prompt: int
    new: int
    lora: bool = True
    checkpointing: bool = True
    rank: int = 8
    beta: float = 0.5
    hazard: float = 0.0  # with which a sampled text ends at each token

    @property
    def mean_new(self) -> float:
        return sum(live_shares(self.new, self.hazard))


STEP_SHAPES = {
    "seed": Shape(SHAPES["1b"], SHAPES["8b"], batch=3, accumulation=2, prompt=64, new=128),
    "long": Shape(SHAPES["1b"], SHAPES["8b"], batch=4, accumulation=2, prompt=256, new=768),
    "tail64": Shape(SHAPES["1b"], SHAPES["8b"], 8, 8, prompt=256, new=1024, rank=16, beta=1.0, hazard=1 / 300),
    "tail256": Shape(SHAPES["1b"], SHAPES["8b"], 8, 32, prompt=256, new=1024, rank=16, beta=1.0, hazard=1 / 300),
    "tail4k": Shape(SHAPES["1b"], SHAPES["8b"], 4, 4, prompt=512, new=4096, rank=16, beta=1.0, hazard=1 / 1200),
    "qwen": Shape(SHAPES["qwen0.5b"], SHAPES["qwen7b"], 8, 1, prompt=512, new=256, rank=16, beta=0.1),
    "full17": Shape(SHAPES["qwen1.7b"], SHAPES["qwen7b"], 8, 2, prompt=256, new=512, lora=False, beta=1.0),
    "quickstart": Shape(SMOL | {"num_hidden_layers": 15}, SMOL, 8, 1, prompt=87, new=32, lora=False, checkpointing=False),
    "tiny": Shape(*[SHAPES["tiny"] | {"vocab_size": 2048}] * 2, batch=2, accumulation=2, prompt=16, new=8),
}  # fmt: skip
# λ, seq_kd, and the shares of steps with text by the student and by the teacher.
MODES = {
    "on_policy": (1.0, False, 1.0, 0.0),
    "off_policy": (0.0, False, 0.0, 0.0),
    "seq_kd": (0.0, True, 0.0, 1.0),
    "mix": (0.5, True, 0.5, 0.5),
    "mix_each_step": (0.5, True, 0.5, 0.5),
    "mix_epoch2": (0.5, True, 0.5, 0.25),  # about half of the rows have the teacher's text already
}
COLUMNS = [
    Column("run", "run"),
    Column("first", "first s", ".2f"),
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
    Column("floor", "floor s", ".3f"),
    Column("above_floor", "median / floor", ".1f"),
]


@dataclass
class Run:
    trainer: str
    mode: str
    steps: int

    @property
    def epochs(self) -> int:
        return 2 if self.mode == "mix" and self.trainer.startswith("gkd") else 1

    @classmethod
    def parse(cls, text: str, steps: int) -> "Run":
        name, _, run_steps = text.partition("@")
        trainer, _, mode = name.partition(":")
        return cls(trainer, mode, int(run_steps or steps))

    def problem(self) -> str | None:
        if (
            self.trainer not in ("stock", "distillation", "gkd", "gkd_compiled")
            or self.mode not in MODES
            or self.mode == "mix_epoch2"
        ):
            return f"trainers are stock, distillation, gkd and gkd_compiled, modes {', '.join(MODES)}"
        if self.trainer == "distillation" and self.mode != "on_policy":
            return "DistillationTrainer is on-policy alone"
        if self.mode == "mix_each_step" and not self.trainer.startswith("gkd"):
            return "gkd alone caches teacher text"
        return None if self.steps >= 2 else "two steps at least: the first is counted apart"


class Clock(TrainerCallback):
    """Records the end of each step, and the peak memory of all steps but the first."""

    def __init__(self):
        self.times: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        synchronize()
        self.times.append(time.perf_counter())
        self.weights = torch.cuda.memory_allocated() if CUDA else 0  # both models, before any optimizer state

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.times.append(time.perf_counter())
        if CUDA and len(self.times) == 2:
            torch.cuda.reset_peak_memory_stats()


def rows_of(shape: Shape, count: int) -> Dataset:
    """Conversations of exactly `prompt` and `new` tokens under the byte tokenizer and its template."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return "".join(draw.choices(string.ascii_lowercase, k=length))

    # The template adds four tokens to a prompt, and one to an answer.
    turns = ([("user", text(shape.prompt - 4)), ("assistant", text(shape.new - 1))] for _ in range(count))
    return Dataset.from_list([{"messages": [{"role": r, "content": c} for r, c in turn]} for turn in turns])


def settings(shape: Shape, folder: str, steps: int) -> dict:
    """The flags of all trainers."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": shape.batch,
        "gradient_accumulation_steps": shape.accumulation,
        "gradient_checkpointing": shape.checkpointing,
        "max_steps": steps,
        "learning_rate": 2e-5,
        "beta": shape.beta,
        "bf16": CUDA,
        "use_cpu": not CUDA,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def lora(shape: Shape) -> LoraConfig | None:
    return (
        LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        if shape.lora
        else None
    )


def build(run: Run, shape: Shape, folder: str, ranks: int):
    """The trainer of a run, on models with random weights."""
    lmbda, seq_kd, _, _ = MODES[run.mode]
    student, teacher = random_model(shape.student, seed=0), random_model(shape.teacher, seed=1)
    if shape.hazard:
        for model in (student, teacher):
            model.generation_config.eos_token_id = stop_ids(model.config.vocab_size, shape.hazard)
    if CUDA and not shape.lora:
        student.float()  # full fine-tuning has fp32 weights
    rows = rows_of(shape, shape.batch * shape.accumulation * ranks * run.steps)
    common = settings(shape, folder, run.steps * run.epochs)
    options = {
        "model": student,
        "teacher_model": teacher,
        "processing_class": tokenizer(),
        "peft_config": lora(shape),
    }
    if run.trainer == "distillation":
        teacher.requires_grad_(False)
        config = DistillationConfig(max_completion_length=shape.new, **common)
        prompts = rows.map(lambda row: {"prompt": row["messages"][:1]}, remove_columns="messages")
        return DistillationTrainer(args=config, train_dataset=prompts, **options)
    common |= {"lmbda": lmbda, "seq_kd": seq_kd, "max_new_tokens": shape.new}
    common["max_length"] = shape.prompt + shape.new + 16  # TRL also scores a line feed behind the answer
    if run.trainer == "stock":
        teacher.requires_grad_(False)
        return StockGKDTrainer(args=GKDConfig(**common), train_dataset=rows, **options)
    cache = "off" if run.mode == "mix_each_step" else "auto"
    args = GKDArguments(teacher_text_cache=cache, torch_compile=run.trainer == "gkd_compiled", **common)
    return GKDTrainer(args=args, train_dataset=rows, teacher_processing_class=tokenizer(), **options)


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


def measured(run: Run, shape: Shape, ranks: int = 1) -> list[dict]:
    """Trains, and returns a row of numbers for each epoch; none on other ranks than the first."""
    if CUDA:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    trainer = build(run, shape, os.path.join(tempfile.gettempdir(), "step_time"), ranks)
    clock = Clock()
    trainer.add_callback(clock)
    counts = count_tokens(trainer)
    trainer.train()
    step_seconds = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    of_steps = [sum(count for at, count in counts if at == step) for step in range(len(step_seconds))]
    tokens, text, everything = trainer.accelerator.reduce(torch.stack(of_steps).T.float(), reduction="sum").tolist()
    history = [log for log in trainer.state.log_history if "loss" in log]
    rows = []
    for epoch in range(run.epochs):
        part = slice(epoch * run.steps, (epoch + 1) * run.steps)
        seconds, logs = step_seconds[part], history[part]
        later = slice(0 if epoch else 1, None)  # the very first step includes one-off work
        row = {
            "mode": run.mode if epoch == 0 else f"{run.mode}_epoch{epoch + 1}",
            "first": seconds[0],
            "median": statistics.median(seconds[later]),
            "mean": statistics.mean(seconds),
            "tokens": statistics.mean(tokens[part]),
            "padding": 1 - sum(text[part]) / sum(everything[part]),
            "tokens_per_second": sum(tokens[part][later]) / sum(seconds[later]),
            "seconds": seconds,
            "logs": logs,
        }
        for phase in ("generating", "training"):
            if f"seconds_{phase}" in logs[-1]:
                row[phase] = statistics.mean(log[f"seconds_{phase}"] for log in logs[later])
        if any("seconds_capturing" in log for log in logs):
            row["capturing"] = sum(log.get("seconds_capturing", 0.0) for log in logs)
        if CUDA:
            row["weights_gib"] = clock.weights / 2**30
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            row["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        rows.append(row)
    return rows if trainer.is_world_process_zero() else []


def floor(shape: Shape, mode: str, flops: float, bandwidth: float) -> float:
    """The minimal seconds of a step of this shape at these rates; see the top of this file."""
    _, _, student_writes, teacher_writes = MODES[mode]
    sequences = shape.batch * shape.accumulation
    passes = 2 if shape.lora else 3  # forward, gradient to the input, and to the weights where they train
    new = shape.mean_new if student_writes or teacher_writes else shape.new
    products = written = 0.0
    for model, times, share in ((shape.student, passes, student_writes), (shape.teacher, 1, teacher_writes)):
        layers, head = weights(model)
        products += 2 * sequences * times * ((shape.prompt + new) * layers + new * head)
        written += share * decode_floor(model, sequences, shape.prompt, shape.new, shape.hazard, flops, bandwidth)
    return products / flops + written


def mix_notes(rows: list[dict]) -> list[str]:
    """The seconds of 20 steps of the mix, measured or derived from its two halves."""
    by_run = {(row["trainer"], row["mode"]): row for row in rows if "failed" not in row}
    notes = []
    for trainer in dict.fromkeys(trainer for trainer, _ in by_run):
        for mode in ("mix", "mix_each_step", "mix_epoch2"):
            if row := by_run.get((trainer, mode)):
                total = row["first"] + 19 * statistics.mean(row["seconds"][1:])
                notes.append(f"{trainer}, 20 steps of {mode}: {total:.1f} s, the first included.")
        halves = [by_run.get((trainer, mode)) for mode in ("on_policy", "seq_kd")]
        if all(halves) and (trainer, "mix") not in by_run:
            total = sum(10 * row["median"] for row in halves)
            notes.append(f"{trainer}, 20 steps of the mix: {total:.1f} s, derived: 10 medians of each half.")
    return notes


def main() -> None:
    arguments = parser(__doc__, "step_time", limit=600)
    arguments.add_argument("--shape", choices=STEP_SHAPES, default="tiny")
    default = ["stock:on_policy", "distillation:on_policy", "gkd:on_policy", "stock:off_policy", "gkd:off_policy"]
    arguments.add_argument("--runs", nargs="+", default=default, metavar="TRAINER:MODE[@STEPS]")
    arguments.add_argument("--steps", type=int, default=8)
    arguments.add_argument("--ranks", type=int, help="GPUs of a run, under ds_configs/zero2.yaml")
    args = arguments.parse_args()
    shape = STEP_SHAPES[args.shape]
    if args.variant:
        run, ranks = Run.parse(args.variant, args.steps), args.ranks or 1
        for row in measured(run, shape, ranks):
            name = args.variant.replace(run.mode, row["mode"], 1)
            emit(run=name, shape=args.shape, trainer=run.trainer, ranks=ranks, **row)
        return
    runs = {text: Run.parse(text, args.steps) for text in args.runs}
    for text, run in runs.items():
        if problem := run.problem():
            arguments.error(f"{text}: {problem}")
    config = str(REPO / "ds_configs/zero2.yaml")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(args.ranks)]
    rows = run_all(list(runs), args, COLUMNS, args.ranks or 1, launcher if args.ranks else ())
    speeds = rates()
    for row in rows:
        if "failed" not in row:
            row["floor"] = floor(shape, row["mode"], *speeds)
            row["above_floor"] = row["median"] / row["floor"]
    write(args, COLUMNS, rows, mix_notes(rows))


if __name__ == "__main__":
    main()
