"""Trainers of tiny models: what each training of a test has in common stands here, a test gives what differs."""

from datasets import Dataset
from tiny import ROWS, make_model, make_tokenizer

from gkd.config.training import GKDArguments
from gkd.training.trainer import GKDTrainer

FLAGS = {
    "per_device_train_batch_size": 2,
    "max_steps": 1,
    "learning_rate": 0.0,
    "lmbda": 0.0,
    "max_new_tokens": 6,
    "max_length": 80,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
# Answers of one word to three: more rows than a step takes.
TWELVE_ROWS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes " * (n % 3 + 1)}]}
    for n in range(12)
]


def tiny_trainer(
    folder, student, teacher, rows=ROWS, held_out=None, cls=GKDTrainer, arguments=GKDArguments, more=None, **flags
):
    """Of one step, which moves no weight, unless `flags` say otherwise.

    Args:
        rows, held_out: a list, a Dataset or None.
        cls, arguments: the classes of the trainer and of its arguments.
        more: what the trainer takes besides, such as `peft_config`.
    """
    args = arguments(**({"output_dir": str(folder)} | FLAGS | flags))
    data = {"train_dataset": rows, "eval_dataset": held_out}
    data = {name: Dataset.from_list(part) if isinstance(part, list) else part for name, part in data.items()}
    more = {"processing_class": make_tokenizer()} | (more or {})
    return cls(student, teacher, args, **data, **more)


def make_trainer(tmp_path, cls=GKDTrainer, rows=TWELVE_ROWS, held_out=None, student=None, **flags):
    """Of three steps, each of which is saved in `tmp_path/run`, unless `flags` say otherwise."""
    steps = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 3}
    flags = steps | {"save_strategy": "steps", "save_steps": 1} | flags
    student = make_model(0) if student is None else student
    return tiny_trainer(tmp_path / "run", student, make_model(1), rows, held_out, cls, **flags)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def losses(trainer):
    """Of each step that was logged."""
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]
