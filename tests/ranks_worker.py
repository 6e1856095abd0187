"""Started by tests/test_two_ranks.py under torchrun: one optimizer step; rank 0 prints loss and gradients.

torchrun --nproc_per_node 2 tests/ranks_worker.py OUT.pt LMBDA ACCUMULATION
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch
from datasets import Dataset
from tiny import make_model, make_tokenizer

from gkd.arguments import GKDArguments
from gkd.trainer import GKDTrainer

# Rows of very different length, one without an answer: the mean of means is not the mean.
ROWS = [("one?", "1"), ("say a lot", "much and more and more"), ("hm?", ""), ("two?", "2, or 3")]


def main(out: str, lmbda: float, accumulation: int) -> None:
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in ROWS]
    args = GKDArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        logging_steps=1,
        max_new_tokens=9,
        max_length=80,
        learning_rate=0.0,
        max_grad_norm=0.0,
        lmbda=lmbda,
        # (all but) greedy: the noise differs per rank on purpose, the comparison is of one text
        temperature=1e-4,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    trainer = GKDTrainer(
        make_model(0), make_model(1), args, None, Dataset.from_list(rows), processing_class=make_tokenizer()
    )
    grads = {}

    def keep(*_args, **_kwargs):
        grads.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    original = trainer.create_optimizer

    def create(*a, **k):
        optimizer = original(*a, **k)
        optimizer.register_step_pre_hook(keep)
        return optimizer

    trainer.create_optimizer = create
    trainer.train()
    if trainer.is_world_process_zero():
        log = next(entry for entry in trainer.state.log_history if "loss" in entry)
        torch.save({"loss": log["loss"], "log": log, "grads": grads}, out)
    # Not through the interpreter's end: a gloo thread that frees its last tensor meanwhile waits for a GIL that is
    # gone, and aborts the process (torch 2.13).
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
