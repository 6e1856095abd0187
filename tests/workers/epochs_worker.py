"""Started by test_two_ranks.py under torchrun: three epochs of a mix; rank 0 writes its log, each rank what it generated.

torchrun --nproc_per_node 2 tests/workers/epochs_worker.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from tiny import make_model
from trainers import tiny_trainer

from gkd.data.batch import Source

ROWS = [{"prompt": [{"role": "user", "content": f"{'and ' * (n % 5)}{n}?"}]} for n in range(16)]


def main(folder: str) -> None:
    trainer = tiny_trainer(
        Path(folder, "run"),
        make_model(0),
        make_model(1),
        ROWS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_steps=-1,
        num_train_epochs=3,
        generation_batch_size=4,
        lmbda=0.5,
        seq_kd=True,
    )
    generated = []

    def watched(source, write):
        def watching(prompts, *args):
            generated.append([trainer.state.global_step, source.label, len(prompts)])
            return write(prompts, *args)

        return watching

    writer, teacher = trainer.rollout.writer, trainer.teacher
    writer.write_student = watched(Source.ON_POLICY, writer.write_student)
    teacher.write = watched(Source.TEACHER, teacher.write)
    trainer.train()
    Path(folder, f"generated-{trainer.args.process_index}.json").write_text(json.dumps(generated))
    if trainer.is_world_process_zero():
        Path(folder, "log.json").write_text(json.dumps(trainer.state.log_history))
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # see ranks_worker.py


if __name__ == "__main__":
    main(sys.argv[1])
