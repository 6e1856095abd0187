#!/usr/bin/env bash
# Two teachers of one base, each a LoRA adapter that knows one task, and a student that learns both from prompts alone
# (experiments/two_teachers.py). Beside it a student of each teacher alone, on the same prompts with as many steps: the tables
# at the end. The same command goes on where it was stopped. Half an hour on two CPU cores.
#   BASE    the model of all, by name or folder (default: SmolLM2-135M-Instruct)
#   OUT     where all goes (default: runs/two_teachers)
#   CONFIG  of the trainings (default: ds_configs/cpu.yaml)
# Flags behind it go to the three distillations.
set -euo pipefail
cd "$(dirname "$0")/.."
BASE=${BASE:-HuggingFaceTB/SmolLM2-135M-Instruct}
OUT=${OUT:-runs/two_teachers}
CONFIG=${CONFIG:-ds_configs/cpu.yaml}

[ -f "$OUT/people/train.jsonl" ] || python experiments/two_teachers.py "$OUT"

for task in dates people; do
    [ -d "$OUT/teachers/$task" ] || { TEACHER=$BASE DATA=$OUT/$task OUT=$OUT/$task.partial CONFIG=$CONFIG \
        experiments/tune_teacher.sh --dtype float32 --bf16 False --max_steps 60 --learning_rate 1e-3 \
        --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --gradient_checkpointing False --save_strategy no
        mkdir -p "$OUT/teachers"
        mv "$OUT/$task.partial" "$OUT/teachers/$task"; }
done

distil() {  # NAME FLAGS...
    [ -f "$OUT/$1/report.html" ] || accelerate launch --quiet --config_file "$CONFIG" train_gkd.py \
        --model_name_or_path "$BASE" --use_peft --lora_r 16 --lora_alpha 32 --dtype float32 --bf16 False \
        --dataset_name "$OUT/prompts.jsonl" --eval_dataset_name "$OUT/held_out.jsonl" --output_dir "$OUT/$1" \
        --scorer experiments.two_teachers:solved --max_new_tokens 32 --max_length 128 \
        --lmbda 0.5 --beta 0.5 --seq_kd True --max_steps 60 --learning_rate 1e-3 --lr_scheduler_type cosine \
        --warmup_steps 5 --per_device_train_batch_size 8 --per_device_eval_batch_size 20 --gradient_checkpointing False --logging_steps 5 \
        --save_strategy no --resume_from_checkpoint auto --report_to none "${@:2}"
    [ -f "$OUT/$1/report.html" ]  # a signal stops it before
}

distil both --teachers "dates=$BASE:$OUT/teachers/dates" "people=$BASE:$OUT/teachers/people" "$@"
distil dates_alone --teacher_model_name_or_path "$BASE" --teacher_adapter "$OUT/teachers/dates" "$@"
distil people_alone --teacher_model_name_or_path "$BASE" --teacher_adapter "$OUT/teachers/people" "$@"

for name in both dates_alone people_alone; do
    echo "$name:"
    grep -E '^\| (\||score|accuracy|.*solved)' "$OUT/$name/report.md"
done
