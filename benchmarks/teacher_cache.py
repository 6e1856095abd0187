"""Savings, costs and error of a teacher cache: steps with and without the teacher, bytes, and the divergence's error.

    python benchmarks/teacher_cache.py --runs seed:live seed:topk seed:hidden long:live long:topk long:hidden
    python benchmarks/teacher_cache.py --runs tiny:live tiny:topk error --student STUDENT --teacher TEACHER \
        --dataset_name data/prompts_train.json --rows 16 --train_steps 20

SHAPE:live, SHAPE:topk and SHAPE:hidden train at λ = 0 in the shapes of step_time.py, with random weights, against the teacher
in memory and against a cache of its 64 likeliest tokens or of its hidden states, which is written first, in batches of the
same size. `caching tokens/s` are scored tokens, including the writing to disk. Peak memory is that of training, after its first step.

`error` takes two real models. The teacher writes answers to `--rows` prompts, unless all rows have an answer. For each k
the table has the bytes a token on disk, the share of the divergence that is kept at β = 0, 0.5 and 1, and the error of its
gradient to the student's logits relative to the whole gradient's norm. With `--train_steps`, the same follows for a
student that has trained so many steps on a cache at k = 64 of the rows that follow.
"""

import gc
import os
import statistics
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from common import CUDA, DEVICE, Column, emit, parser, random_model, run_all, timed, write
from random_pair import BASE, tokenizer
from steps import STEP_SHAPES, Clock, Shape, lora, rows_of, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from gkd.config.caching import CacheArguments
from gkd.config.training import GKDArguments
from gkd.data.batch import scored_positions
from gkd.data.encoding import RowEncoder, encode_dataset
from gkd.data.loading import load_rows
from gkd.data.rows import has_answer
from gkd.losses.divergences import jsd, statistics_and_gradient
from gkd.losses.topk import TopK
from gkd.models.heads import LogitHead, last_hidden_states
from gkd.models.loading import freeze
from gkd.models.pairing import Pairing, Side
from gkd.teachers.cache import TeacherCache
from gkd.teachers.cache_files import CacheWriter, cache_settings
from gkd.teachers.caching import TeacherPass
from gkd.training.trainer import GKDTrainer

K = 64
MODES = ("live", "topk", "hidden")
KS = (8, 32, 64, 256)
BETAS = (0.0, 0.5, 1.0)
COLUMNS = [
    Column("run", "run"),
    Column("median", "median s", ".3f"),
    Column("mean", "mean s with first", ".3f"),
    Column("peak_gib", "peak GiB", ".2f"),
    Column("caching", "caching tokens/s", ".0f"),
    Column("bytes", "bytes/token", ".0f"),
    *(Column(f"kept_{beta}", f"kept at β = {beta:g}", ".4f") for beta in BETAS),
    *(Column(f"gradient_{beta}", f"gradient off at β = {beta:g}", ".4f") for beta in BETAS),
    Column("divergence_0.0", "forward KL", ".3f"),
    Column("tail", "teacher's mass in the tail", ".5f"),
]


def make_cache(folder: str, student: Side, teacher, encoded, flags: dict) -> tuple[TeacherCache, dict]:
    """A cache of encoded rows by a teacher in memory, and columns of the table: its bytes a token and speed of writing."""
    names = dict.fromkeys(("model_name_or_path", "teacher_model_name_or_path", "dataset_name"), "")
    args = CacheArguments(output_dir=folder, **names, **flags)
    pairing = Pairing.of(student, Side.of_model(teacher, student.tokenizer), args)
    writer = CacheWriter(folder, cache_settings(args, pairing, encoded), len(encoded), args.rows_per_shard)
    teacher_pass = TeacherPass(teacher, Accelerator(cpu=not CUDA), pairing, args)
    rows = encoded.to_list()
    if not args.seq_kd:
        teacher_pass(rows[: args.batch_size], 0)  # warms libraries up
    seconds = timed(
        lambda: [
            writer.write(i, teacher_pass([rows[j] for j in p], i), teacher_pass.head)
            for i, p in enumerate(writer.parts)
        ]
    )
    sums = writer.finish()
    return TeacherCache(folder), {"caching": sums["tokens"] / seconds, "bytes": sums["bytes"] / sums["tokens"]}


def step(shape: Shape, kept: str, steps: int, folder: str) -> dict:
    """Trains for `steps` steps, and returns the numbers of a row."""
    tokens, size = tokenizer(), shape.student.get("vocab_size", BASE["vocab_size"])
    limits = {"max_new_tokens": shape.new, "max_length": shape.prompt + shape.new + 16}
    rows = rows_of(shape, shape.batch * shape.accumulation * steps)
    encoded = encode_dataset(rows, RowEncoder(tokens, limits["max_length"], shape.new, "last_turn", [1]))
    teacher, cache, row = freeze(random_model(shape.teacher, seed=1)), None, {}
    if kept != "live":
        flags = {"keep": kept, "batch_size": shape.batch * shape.accumulation, **limits}
        cache, row = make_cache(os.path.join(folder, "cache"), Side(tokens, size, ()), teacher, encoded, flags)
        teacher = None
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    args = GKDArguments(lmbda=0.0, **limits, **settings(shape, os.path.join(folder, "run"), steps))
    student = random_model(shape.student, seed=0)
    data = None if cache else encoded
    more = {"peft_config": lora(shape), "processing_class": tokens, "teacher_cache": cache}
    trainer = GKDTrainer(student, teacher, args, None, data, **more)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    seconds = clock.seconds
    row |= {"median": statistics.median(seconds[1:]), "mean": statistics.mean(seconds), "seconds": seconds}
    if CUDA:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return row


@torch.no_grad()
def logits_of(model, row: dict, size: int) -> torch.Tensor:
    """A model's logits (n, V) at the row's scored positions."""
    ids, labels = (torch.tensor([row[name]], device=DEVICE) for name in ("input_ids", "labels"))
    hidden = last_hidden_states(model, ids, None)[0].index_select(0, scored_positions(labels))
    return LogitHead.of(model)(hidden)[:, :size].float()


def errors(student, teacher, rows, size: int) -> dict[int, dict]:
    """For each k, the kept share of the divergence and the error of its gradient, for numbers rounded as in a cache."""
    sums = {(k, beta, name): 0.0 for k in (*KS, None) for beta in BETAS for name in ("loss", "square")}
    tails, count = dict.fromkeys(KS, 0.0), 0
    for row in rows:
        logits, teacher_logits = (logits_of(model, row, size) for model in (student, teacher))
        labels = torch.zeros(len(logits), dtype=torch.long, device=DEVICE)
        count += len(logits)
        for beta in BETAS:
            whole, gradient = statistics_and_gradient(logits, teacher_logits, labels, jsd(beta))
            sums[None, beta, "loss"] += whole.loss.double().sum().item()
            sums[None, beta, "square"] += gradient.double().square().sum().item()
            for k in KS:
                topk = TopK.of_logits(teacher_logits, k).stored()
                coarse, coarse_gradient = topk.statistics_and_gradient(logits, labels, jsd(beta))
                sums[k, beta, "loss"] += coarse.loss.double().sum().item()
                sums[k, beta, "square"] += (coarse_gradient - gradient).double().square().sum().item()
                tails[k] += topk.tail.double().exp().sum().item() / len(BETAS)
    return {
        k: {f"kept_{beta}": sums[k, beta, "loss"] / sums[None, beta, "loss"] for beta in BETAS}
        | {f"gradient_{beta}": (sums[k, beta, "square"] / sums[None, beta, "square"]) ** 0.5 for beta in BETAS}
        | {f"divergence_{beta}": sums[None, beta, "loss"] / count for beta in BETAS}
        | {"tail": tails[k] / count}
        for k in KS
    }


def measure_errors(args, folder: str) -> None:
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(DEVICE) for name in (args.teacher, args.student)
    )
    freeze(teacher)
    tokens = AutoTokenizer.from_pretrained(args.student)
    tokens.pad_token = tokens.pad_token or tokens.eos_token
    limits = {"max_new_tokens": args.max_new_tokens, "max_length": args.max_length}
    encoding_args = GKDArguments(output_dir=folder, **limits)
    pairing = Pairing.of_models(student, teacher, encoding_args, tokens, AutoTokenizer.from_pretrained(args.teacher))
    side, size = Side(tokens, pairing.vocab_size, ()), pairing.vocab_size
    data = load_rows(args.dataset_name, "train")
    data = data.select(range(min(args.rows + 8 * args.train_steps, len(data))))
    flags = {"batch_size": 8, "seq_kd": not all(map(has_answer, data)), **limits}
    encoded = pairing.encode(data)
    held_out = encoded.select(range(args.rows))
    disk, text = {}, None
    for k in KS:
        name = os.path.join(folder, f"k{k}")
        if text is not None:  # the same text for each k
            held_out, flags["seq_kd"] = text, False
        cache, columns = make_cache(name, side, teacher, held_out, flags | {"top_k": k})
        disk[k] = columns["bytes"]
        text = cache.rows().remove_columns(["topk_ids", "topk_log_probs", "tail_log_mass"]).with_format(None)
    before = errors(student.eval(), teacher, text, size)
    for k in KS:
        emit(run=f"error, k = {k}", bytes=disk[k], **before[k])
    if not args.train_steps:
        return
    flags["seq_kd"] = not all(map(has_answer, data))
    rest = encoded.select(range(args.rows, len(encoded)))
    cache, _ = make_cache(os.path.join(folder, "rest"), side, teacher, rest, flags | {"top_k": K})
    train_flags = {"max_steps": args.train_steps, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "beta": 0.0}
    train_flags |= {"lmbda": 0.0, "warmup_steps": 3, "lr_scheduler_type": "cosine", "gradient_checkpointing": False}
    train_flags |= {"report_to": "none", "save_strategy": "no", "bf16": CUDA, "use_cpu": not CUDA, "logging_steps": 1}
    train_args = GKDArguments(output_dir=folder, **train_flags, **limits)
    trainer = GKDTrainer(student, args=train_args, processing_class=tokens, teacher_cache=cache)
    trainer.train()
    after = errors(student.eval(), teacher, text, size)
    for k in KS:
        emit(run=f"error after {args.train_steps} steps, k = {k}", bytes=disk[k], **after[k])


def main() -> None:
    arguments = parser(__doc__, "teacher_cache", limit=600)
    arguments.add_argument(
        "--runs", nargs="+", default=["tiny:live", "tiny:topk", "tiny:hidden"], metavar="SHAPE:live|topk|hidden|error"
    )
    arguments.add_argument("--steps", type=int, default=8)
    arguments.add_argument("--student", type=Path, help="of `error`: a folder")
    arguments.add_argument("--teacher", type=Path, help="of `error`: a folder")
    arguments.add_argument("--dataset_name", help="of `error`: a file of rows")
    arguments.add_argument("--rows", type=int, default=16, help="of `error`")
    arguments.add_argument("--train_steps", type=int, default=0, help="of `error`")
    arguments.add_argument("--max_new_tokens", type=int, default=48, help="of `error`")
    arguments.add_argument("--max_length", type=int, default=256, help="of `error`")
    args = arguments.parse_args()
    for run in args.runs:
        shape, _, mode = run.partition(":")
        if run == "error":
            if not (args.student and args.teacher and args.dataset_name):
                arguments.error("error needs --student, --teacher and --dataset_name.")
        elif shape not in STEP_SHAPES or mode not in MODES:
            arguments.error(f"{run}: shapes are {', '.join(STEP_SHAPES)}, modes {', '.join(MODES)}; or error.")
    if args.variant:
        with tempfile.TemporaryDirectory() as folder:
            if args.variant == "error":
                measure_errors(args, folder)
            else:
                shape, _, mode = args.variant.partition(":")
                emit(run=args.variant, **step(STEP_SHAPES[shape], mode, args.steps, folder))
        return
    write(args, COLUMNS, run_all(args.runs, args, COLUMNS))


if __name__ == "__main__":
    main()
