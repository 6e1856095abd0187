"""One training under each kind of parallelism: equal losses and gradient norms, different speed and memory.

    python benchmarks/parallelism.py
    python benchmarks/parallelism.py --variants one_gpu ddp zero2_teacher_sharded --bf16 --shape 1b
    python benchmarks/parallelism.py --variants one_gpu teacher_elsewhere --shape micro  # on a CPU too

Each variant launches train_gkd.py twice, on a pair of models with random weights: λ = 0 scores the dataset's answers,
λ = 1 the student's, sampled at a temperature of 1e-4, so that all variants write the same text. All weights train, and a
step has 8 rows of very different lengths in every variant. In fp32 losses agree to about 1e-4 (AdamW's first steps
amplify rounding errors of small gradients); `--bf16` is for speed. The losses of a 4-bit teacher differ from the others.

Variants with `2` processes need two GPUs. `GiB` is the peak of the first GPU that the student is on.
"""

import json
import random
import socket
import string
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from common import CUDA, REPO, Column, emit, parser, run_all, write
from random_pair import SHAPES


class Variant(NamedTuple):
    config: str  # of ds_configs
    processes: int
    flags: tuple[str, ...] = ()
    gpus: int | None = None  # by default as many as processes

    @property
    def devices(self) -> int:
        return self.gpus or self.processes


ELSEWHERE = "cuda:1" if CUDA else "cpu"
VARIANTS = {
    "one_gpu": Variant("single", 1),
    "teacher_offload": Variant("single", 1, ("--teacher_offload", "True")),
    "teacher_4bit": Variant("single", 1, ("--teacher_load_in_4bit", "True")),
    "teacher_elsewhere": Variant("single", 1, ("--teacher_device", ELSEWHERE), gpus=2),
    "ddp": Variant("ddp", 2),
    "ddp_teacher_sharded": Variant("ddp", 2, ("--teacher_sharded", "True")),
    "zero2": Variant("zero2", 2),
    "zero2_teacher_sharded": Variant("zero2", 2, ("--teacher_sharded", "True")),
    "zero2_offload": Variant("zero2_offload", 2),
    "zero3": Variant("zero3", 2),
    "fsdp2": Variant("fsdp2", 2),
}
BATCH, ROWS = 2, 8  # rows of a device's forward, rows of a step
COLUMNS = [
    Column("run", "run"),
    Column("losses", "loss of each step"),
    Column("norms", "gradient norm"),
    Column("tokens_per_second", "tokens/s", ",.0f"),
    Column("peak_gib", "GiB", ".2f"),
]


def write_rows(path: Path, count: int) -> None:
    """Prompts of 8 to 40 letters with answers of 4 to 60."""
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return "".join(draw.choices(string.ascii_lowercase, k=draw.randint(low, high)))

    rows = [{"prompt": text(8, 40), "completion": text(4, 60)} for _ in range(count)]
    path.write_text(json.dumps(rows))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def launch(words: list[str], limit: float) -> int | None:
    """The exit code of a Python command, None if it takes more than `limit` seconds."""
    process = subprocess.Popen([sys.executable, *words], cwd=REPO)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its processes, which run in sessions of their own
        process.wait(10)
        return None


def train(name: str, lmbda: int, args: Any) -> dict[str, Any]:
    """Launches a training; returns its measurements, or `failed`."""
    variant = VARIANTS[name]
    config = {"single": "single_gpu" if CUDA else "cpu"}.get(variant.config, variant.config)
    folder = (args.out / "runs" / f"{name}-{lmbda}").resolve()
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"ds_configs/{config}.yaml"]
    launcher += ["--num_processes", variant.processes, "--main_process_port", free_port()]
    flags = {
        "model_name_or_path": (args.out / "pair/student").resolve(),
        "teacher_model_name_or_path": (args.out / "pair/teacher").resolve(),
        "dataset_name": (args.out / "rows.json").resolve(),
        "output_dir": folder,
        "lmbda": lmbda,
        "beta": 0.5,
        "temperature": 1e-4,
        "max_new_tokens": 48,
        "max_length": 256,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ROWS // BATCH // variant.processes,
        "train_sampling_strategy": "sequential",
        "max_steps": args.steps,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "preflight": "off",
        "disable_tqdm": True,
        "bf16": args.bf16,
        "dtype": "float32",
        "teacher_dtype": "bfloat16" if args.bf16 else "float32",
    }
    words = [f"--{key}={value}" for key, value in flags.items()]
    limit = (args.limit - 20) / 2  # two trainings, and 20 s for imports
    code = launch([str(word) for word in (*launcher, "train_gkd.py", *words, *variant.flags)], limit)
    if code is None:
        return {"failed": f"not finished in {limit:.0f} s"}
    if code != 0:
        return {"failed": f"exit code {code}, see the log"}
    logs = [log for log in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in log]
    speeds = [log["tokens_per_second"] for log in logs[1:]]  # the first step includes one-off work
    return {
        "losses": " ".join(f"{log['loss']:.6g}" for log in logs),
        "norms": " ".join(f"{log['grad_norm']:.5g}" for log in logs),
        "tokens_per_second": sum(speeds) / len(speeds),
        "peak_gib": max(log["peak_memory_gib"] for log in logs) if CUDA else None,
    }


def main() -> None:
    arguments = parser(__doc__, "parallelism", limit=100)
    arguments.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments.add_argument("--shape", choices=SHAPES, default="small", help="of student and teacher")
    arguments.add_argument("--steps", type=int, default=4)
    arguments.add_argument("--bf16", action="store_true")
    args = arguments.parse_args()
    if args.variant:
        for lmbda in (0, 1):
            emit(
                run=f"{args.variant}, λ = {lmbda}",
                variant=args.variant,
                lmbda=lmbda,
                **train(args.variant, lmbda, args),
            )
        return
    args.out.mkdir(parents=True, exist_ok=True)
    pair = [sys.executable, REPO / "benchmarks/random_pair.py", args.out / "pair"]
    subprocess.run([*pair, "--student", args.shape, "--teacher", args.shape], check=True)
    write_rows(args.out / "rows.json", ROWS * args.steps)
    rows = []
    for devices in (1, 2):  # variants of one GPU run side by side
        chosen = [name for name in args.variants if VARIANTS[name].devices == devices]
        rows += run_all(chosen, args, COLUMNS, devices)
    write(args, COLUMNS, rows)


if __name__ == "__main__":
    main()
