"""TRL's GOLD trainer on rows with answers: `python experiments/gold.py STUDENT TEACHER ROWS OUT`

A peer for `gkd train --cross_tokenizer`: the same rows, in float32, with TRL's own loss by name and by rank ("hybrid") and tokens merged by
the chain rule ("bayesian"), as `--cross_tokenizer uld` has it. Flags of TRL's GOLDConfig may follow, such as `--max_steps 40`. Writes the
student and TRL's trainer_state.json to OUT.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl.experimental.gold import GOLDConfig, GOLDTrainer

FIXED = {
    "lmbda": "0",
    "use_uld_loss": "True",
    "uld_use_hybrid_loss": "True",
    "uld_token_merge_strategy": "bayesian",
    "bf16": "False",
    "gradient_checkpointing": "False",
    "save_strategy": "no",
    "report_to": "none",
}


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if len(words) < 4 or any(word.startswith("-") for word in words[:4]):
        sys.exit(__doc__)
    student, teacher, rows, out = words[:4]
    fixed = [word for name, value in FIXED.items() for word in (f"--{name}", value)]
    options = ["--output_dir", out, "--teacher_tokenizer_name_or_path", teacher]
    (config,) = HfArgumentParser(GOLDConfig).parse_args_into_dataclasses([*options, *fixed, *words[4:]])
    models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (student, teacher)]
    trainer = GOLDTrainer(
        model=models[0],
        teacher_model=models[1],
        args=config,
        train_dataset=load_dataset("json", data_files=rows, split="train"),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
