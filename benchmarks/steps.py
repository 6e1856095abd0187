"""A step of training to time: its shapes, each trainer on models with random weights, and the least seconds it can take."""

import random
import string
import time
from dataclasses import dataclass
from itertools import pairwise

import torch
import vllm_peer
from common import CUDA, decode_floor, live_shares, random_model, stop_ids, synchronize, weights
from datasets import Dataset
from peft import LoraConfig
from random_pair import BASE, SHAPES, tokenizer
from transformers import PreTrainedModel, TrainerCallback

from gkd.compat import GKDConfig, StockGKDTrainer
from gkd.config.training import GKDArguments
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
    # As many tokens as tail64, whose answers have 262 on average, in rows of one length.
    "equal64": Shape(SHAPES["1b"], SHAPES["8b"], 8, 8, prompt=256, new=262, rank=16, beta=1.0),
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
TRAINERS = ("stock", "distillation", "distillation_vllm", "gkd", "gkd_compiled")


@dataclass
class Run:
    """A trainer on the text of a mode.

    Attributes:
        shape: a name of `STEP_SHAPES`.
        limit: seconds that it may take; by default those of all runs.
    """

    trainer: str
    mode: str
    steps: int
    shape: str = "tiny"
    limit: int | None = None

    @property
    def epochs(self) -> int:
        return 2 if self.mode == "mix" and self.trainer.startswith("gkd") else 1

    @classmethod
    def parse(cls, text: str, steps: int, shape: str) -> "Run":
        """Of [SHAPE/]TRAINER:MODE[@STEPS[@SECONDS]]; raises ValueError where a number is none, or there are more."""
        name, *numbers = text.split("@")
        if len(numbers) > 2:
            raise ValueError("a run is [SHAPE/]TRAINER:MODE[@STEPS[@SECONDS]]")
        where, _, name = name.rpartition("/")
        trainer, _, mode = name.partition(":")
        run_steps, limit = [*map(int, numbers), *[None] * 2][:2]
        return cls(trainer, mode, steps if run_steps is None else run_steps, where or shape, limit)

    def problem(self) -> str | None:
        if self.shape not in STEP_SHAPES:
            return f"shapes are {', '.join(STEP_SHAPES)}"
        if self.trainer not in TRAINERS or self.mode not in MODES or self.mode == "mix_epoch2":
            return f"trainers are {', '.join(TRAINERS)}, modes {', '.join(MODES)}"
        if self.trainer.startswith("distillation") and self.mode != "on_policy":
            return "DistillationTrainer is on-policy alone"
        if self.mode == "mix_each_step" and not self.trainer.startswith("gkd"):
            return "gkd alone caches teacher text"
        return None if self.steps >= 2 else "two steps at least: the first is counted apart"


class Clock(TrainerCallback):
    """Records the end of each step, and the peak memory: of all steps but the first, unless that one `counts`."""

    def __init__(self, counts: bool = False):
        self.times: list[float] = []
        self.counts = counts

    @property
    def seconds(self) -> list[float]:
        """Of each step."""
        return [after - before for before, after in pairwise(self.times)]

    def on_train_begin(self, args, state, control, **kwargs):
        synchronize()
        self.times.append(time.perf_counter())
        self.weights = torch.cuda.memory_allocated() if CUDA else 0  # both models, before any optimizer state

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.times.append(time.perf_counter())
        if CUDA and len(self.times) == 2 and not self.counts:
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


def ending_model(shape: dict, seed: int, hazard: float) -> PreTrainedModel:
    """A `random_model`, which ends a text at each token with this probability, unless it is 0."""
    model = random_model(shape, seed)
    if hazard:
        model.generation_config.eos_token_id = stop_ids(model.config.vocab_size, hazard)
    return model


def models(trainer: str, shape: Shape) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher with random weights, which end a text at each token with the shape's `hazard`."""
    vocab_size = {"vocab_size": shape.teacher.get("vocab_size", BASE["vocab_size"])}
    own = {} if trainer.startswith("gkd") else vocab_size  # TRL's trainers take no vocabularies that differ in padding
    student, teacher = ending_model(shape.student | own, 0, shape.hazard), ending_model(shape.teacher, 1, shape.hazard)
    if trainer == "distillation_vllm":
        vllm_peer.save(student)
    if CUDA and not shape.lora:
        student.float()  # full fine-tuning has fp32 weights
    return student, teacher


def build(
    run: Run,
    shape: Shape,
    folder: str,
    ranks: int,
    pair: tuple[PreTrainedModel, PreTrainedModel],
    memory: float = 0.35,
):
    """The trainer of a run, on a `pair` by `models`; `memory` is the share of the GPU that vLLM takes."""
    lmbda, seq_kd, _, _ = MODES[run.mode]
    student, teacher = pair
    rows = rows_of(shape, shape.batch * shape.accumulation * ranks * run.steps)
    common = settings(shape, folder, run.steps * run.epochs)
    options = {
        "model": student,
        "teacher_model": teacher,
        "processing_class": tokenizer(),
        "peft_config": lora(shape),
    }
    if not run.trainer.startswith("gkd"):
        teacher.requires_grad_(False)
    if run.trainer.startswith("distillation"):
        from trl import DistillationConfig, DistillationTrainer  # here, since it imports vLLM where that is installed

        if run.trainer == "distillation_vllm":
            common |= vllm_peer.settings(student, shape.prompt + shape.new + 64, memory)
        config = DistillationConfig(max_completion_length=shape.new, **common)
        prompts = rows.map(lambda row: {"prompt": row["messages"][:1]}, remove_columns="messages")
        return DistillationTrainer(args=config, train_dataset=prompts, **options)
    common |= {"lmbda": lmbda, "seq_kd": seq_kd, "max_new_tokens": shape.new}
    common["max_length"] = shape.prompt + shape.new + 16  # TRL also scores a line feed behind the answer
    if run.trainer == "stock":
        return StockGKDTrainer(args=GKDConfig(**common), train_dataset=rows, **options)
    cache = "off" if run.mode == "mix_each_step" else "auto"
    args = GKDArguments(teacher_text_cache=cache, torch_compile=run.trainer == "gkd_compiled", **common)
    return GKDTrainer(args=args, train_dataset=rows, teacher_processing_class=tokenizer(), **options)


def floor(shape: Shape, mode: str, flops: float, bandwidth: float) -> float:
    """The minimal seconds of a step of this shape at these rates; see the top of step_time.py."""
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
