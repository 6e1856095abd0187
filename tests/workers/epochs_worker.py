"""Started by test_two_ranks.py under torchrun: three epochs of a mix; rank 0 writes its log, each rank what it generated.

torchrun --nproc_per_node 2 tests/workers/epochs_worker.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from datasets import Dataset
from tiny import make_model, make_tokenizer

from gkd.config.training import GKDArguments
from gkd.rollout.writer import TextWriter
from gkd.training.trainer import GKDTrainer

ROWS = [{"prompt": [{"role": "user", "content": f"{'and ' * (n % 5)}{n}?"}]} for n in range(16)]


def main(folder: str) -> None:
    generated, generate = [], TextWriter._generate

    def watched(self, prompts, mask, source, seed):
        generated.append([trainer.state.global_step, source.label, len(prompts)])
        return generate(self, prompts, mask, source, seed)

    TextWriter._generate = watched
    args = GKDArguments(
        output_dir=str(Path(folder, "run")),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        logging_steps=1,
        max_new_tokens=6,
        max_length=80,
        generation_batch_size=4,
        lmbda=0.5,
        seq_kd=True,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = Dataset.from_list(ROWS)
    trainer = GKDTrainer(make_model(0), make_model(1), args, None, rows, processing_class=make_tokenizer())
    trainer.train()
    Path(folder, f"generated-{trainer.args.process_index}.json").write_text(json.dumps(generated))
    if trainer.is_world_process_zero():
        Path(folder, "log.json").write_text(json.dumps(trainer.state.log_history))
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # see ranks_worker.py


if __name__ == "__main__":
    main(sys.argv[1])
