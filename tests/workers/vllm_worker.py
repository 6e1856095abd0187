"""Started by test_vllm_engine.py under torchrun: on-policy steps with an engine on each rank, whose text is transformers'.

torchrun --nproc_per_node 2 tests/workers/vllm_worker.py FOLDER
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from prompts import MASK, PROMPTS, config
from tiny import make_model
from trainers import losses, make_trainer

from gkd.generation.generator import CompletionGenerator, complete


def main(folder: str) -> None:
    student = make_model(0, hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    flags = {"lmbda": 1.0, "generation_backend": "vllm", "save_strategy": "no"}
    trainer = make_trainer(Path(folder), student=student, **flags)
    trainer.train()
    texts = [
        complete(trainer.model, trainer.accelerator, generator, PROMPTS, MASK, config(max_new_tokens=20), 1)[
            0
        ].tolist()
        for generator in (trainer.generator, CompletionGenerator("dynamic"))
    ]
    assert texts[0] == texts[1]
    Path(folder, f"{trainer.accelerator.process_index}.txt").write_text(str(losses(trainer)))


if __name__ == "__main__":
    main(*sys.argv[1:])
