"""Small runs for tests/training/test_resume.py and benchmarks/survival.py: what they did at each step, and how they end.

python tests/workers/resume_worker.py run FOLDER OPTIONS       one run; goes on from the last whole checkpoint in FOLDER/run
python tests/workers/resume_worker.py matrix FOLDER CASES      for each case a whole run, and one that crashes and is resumed

OPTIONS is a JSON object of GKDArguments (and `lora`; `dies`: a rank, a step and the signal it gets there; `memory_each`: steps between two looks), CASES one of such objects by name. Under torchrun with several ranks too. A run
leaves `trace-RANK.jsonl` with a line a step (its number, who wrote its text, a checksum of it, its losses, the gradient's
norm), `log.json`, and at its end `final.safetensors`; a matrix leaves `matrix.json`.
"""

import json
import os
import random
import sys
import zlib
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import psutil
import torch
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny import make_model
from trainers import tiny_trainer
from transformers import TrainerCallback

from gkd.data.batch import Source
from gkd.runs.folder import resume_point
from gkd.training.faults import StopOnSignal
from gkd.training.trainer import GKDTrainer

# Some prompts are there twice: their text is one all the same.
QUESTIONS = [f"{'and ' * (n % 5)}{n % 9}?" for n in range(12)]
ROWS = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": q[::-1]}]} for q in QUESTIONS]


HELD_OUT = [{"prompt": [{"role": "user", "content": f"{n} and {n}?"}]} for n in range(40)]


def let_on_policy_win(trainer):
    """By the first rank's clock; that of the others, which must not count, says that on-policy steps take very long.

    Each probe is made to lower the held-out divergence, which tiny models measure with more noise than a few steps change.
    """
    lmbda, now, on_policy = trainer.rollout.lmbda, 0, 1000**trainer.args.process_index
    measure = lmbda.measure

    def clock() -> int:
        nonlocal now
        now += on_policy if trainer.step.source is Source.ON_POLICY else 100
        return now

    def measured() -> list[float]:
        return [value - trainer.state.global_step // lmbda.interval for value in measure()]

    lmbda.clock, lmbda.measure = clock, measured


class Crash(Exception):
    pass


class Traced(GKDTrainer):
    """Notes each step's text and loss as the optimizer sees them."""

    trace: Path
    crash_at: int | None = None
    dies: dict  # {"rank": ..., "step": ..., "signal": ...}

    def get_batch_samples(self, *args):
        batches, tokens = super().get_batch_samples(*args)
        self.seen = [
            self.step.source.label,
            *(zlib.crc32(b["input_ids"].cpu().numpy().tobytes()) for b in self.step.batches),
        ]
        return batches, tokens

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        step = self.state.global_step + 1
        if step == self.crash_at:
            raise Crash
        if (step, self.args.process_index) == (self.dies.get("step"), self.dies.get("rank")):
            os.kill(os.getpid(), self.dies["signal"])
        line = [step, *self.seen, *(float(loss) for loss in self.step.losses), float(norm)]
        with self.trace.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return norm


class Memory(TrainerCallback):
    """Notes the process's resident MiB each so many steps: [[step, MiB], ...]."""

    def __init__(self, path: Path, each: int):
        self.path, self.each, self.seen = path, each, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.each == 0:
            self.seen.append([state.global_step, psutil.Process().memory_info().rss / 2**20])

    def on_train_end(self, *args, **kwargs):
        self.path.write_text(json.dumps(self.seen))


def run(out: Path, options: dict, crash_at: int | None = None) -> Traced:
    options = dict(options)
    lora, dies, each = options.pop("lora", True), options.pop("dies", {}), options.pop("memory_each", None)
    out.mkdir(parents=True, exist_ok=True)
    options = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_steps": -1,
        "num_train_epochs": 2,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "generation_batch_size": 8,
        "use_cpu": not torch.cuda.is_available(),
    } | options
    student = make_model(0)
    if lora:  # its dropout draws random numbers in training
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False)
        student = get_peft_model(student, config)
    auto = options.get("lmbda") == "auto"
    trainer = tiny_trainer(
        out / "run", student, make_model(1), ROWS, HELD_OUT if auto else None, cls=Traced, **options
    )
    args = trainer.args
    if auto:
        let_on_policy_win(trainer)
    trainer.trace, trainer.crash_at = out / f"trace-{args.process_index}.jsonl", crash_at
    trainer.dies = dies
    if each is not None:
        trainer.add_callback(Memory(out / "memory.json", each))
    (checkpoint,) = broadcast_object_list([resume_point(args.output_dir, "auto")])
    with StopOnSignal() as stop:
        trainer.train(resume_from_checkpoint=checkpoint, stop=stop)
    if trainer.is_world_process_zero():
        (out / "log.json").write_text(json.dumps(trainer.state.log_history))
        if not trainer.stopped:
            weights = {name: p.detach().cpu().contiguous() for name, p in trainer.model.named_parameters()}
            save_file(weights, out / "final.partial")
            os.replace(out / "final.partial", out / "final.safetensors")
    trainer.accelerator.wait_for_everyone()
    return trainer


def steps_of(out: Path, rank: int) -> dict[int, list]:
    """What was done at each step; where it was done twice, the last time."""
    return {line[0]: line[1:] for line in map(json.loads, (out / f"trace-{rank}.jsonl").read_text().splitlines())}


def matrix(out: Path, cases: dict[str, dict]) -> None:
    rank = int(os.environ.get("RANK", 0))
    found = {}
    for name, options in cases.items():
        whole, resumed = out / name / "whole", out / name / "resumed"
        steps = run(whole, options).state.global_step
        (crash,) = broadcast_object_list([random.SystemRandom().randint(4, steps)])  # transformers seeds the others
        try:
            run(resumed, options, crash)
        except Crash:
            run(resumed, options)
        mine, theirs = steps_of(resumed, rank), steps_of(whole, rank)
        logs = [
            {log["step"]: log.get("loss") for log in json.loads((folder / "log.json").read_text()) if "loss" in log}
            for folder in (whole, resumed)
        ]
        files = [(folder / "final.safetensors").read_bytes() for folder in (whole, resumed)]
        found[name] = {
            "steps": steps,
            "sources": [theirs[step][0] for step in sorted(theirs)],
            "crash": crash,
            "differ": [step for step in theirs if mine[step] != theirs[step]],
            "logs": logs[0] == logs[1],
            "weights": files[0] == files[1],
            "moved": next(iter(theirs.values()))[-2] != list(theirs.values())[-1][-2],
        }
    (out / f"matrix-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"run": run, "matrix": matrix}[sys.argv[1]](Path(sys.argv[2]), json.loads(sys.argv[3]))
    os._exit(0)  # see ranks_worker.py
