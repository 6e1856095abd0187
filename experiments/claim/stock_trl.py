"""TRL's own GKDTrainer on the same rows with the same flags, the peer of experiments/claim.sh.

    python experiments/claim/stock_trl.py --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \
        --dataset_name rows.jsonl --output_dir runs/stock --lmbda 1 --beta 1

It adds the wall seconds of each step to TRL's log, and nothing else.
"""

import time

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import ModelConfig, ScriptArguments, TrlParser
from trl.experimental.gkd import GKDConfig, GKDTrainer


class StepSeconds(TrainerCallback):
    """Logs `seconds_training`, the wall seconds of the steps since the last log, generation included."""

    seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.began

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            state.log_history[-1]["seconds_training"] = self.seconds
            self.seconds = 0.0


def as_messages(row: dict) -> dict:
    """The only rows that TRL's collator reads."""
    return {"messages": row["messages"] if "messages" in row else row["prompt"] + row["completion"]}


def main() -> None:
    script_args, args, model_args = TrlParser((ScriptArguments, GKDConfig, ModelConfig)).parse_args_and_config()
    rows = load_dataset("json", data_files=script_args.dataset_name, split="train")
    student = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype=model_args.dtype)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher_model_name_or_path, dtype=torch.bfloat16)
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=rows.map(as_messages, remove_columns=rows.column_names),
        processing_class=AutoTokenizer.from_pretrained(model_args.model_name_or_path),
        callbacks=[StepSeconds],
    )
    trainer.train()
    trainer.save_model(args.output_dir)
    trainer.save_state()


if __name__ == "__main__":
    main()
