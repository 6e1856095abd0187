#!/usr/bin/env bash
# Tunes a teacher on your task by TRL's SFT, before it is distilled: a student can't learn from it what it doesn't know.
# The same command goes on from the last checkpoint.
# Prerequisites: pip install -e ., GPUs by CUDA_VISIBLE_DEVICES
#   TEACHER  name or folder of the model to tune
#   DATA     folder with train.jsonl alone, rows of prompt and completion (data/README.md): only completions are trained
#   OUT      the LoRA adapter's folder, for --teacher_adapter; with --use_peft False --dtype float32 the whole model's
#            (16 bytes a weight on each GPU, with Adam's states)
set -euo pipefail
cd "$(dirname "$0")/.."
TEACHER=${TEACHER:-meta-llama/Llama-3.1-8B-Instruct}
: "${DATA:?folder with train.jsonl}"
OUT=${OUT:-runs/teacher}
CONFIG=${CONFIG:-ds_configs/ddp.yaml}

last=$(ls -d "$OUT"/checkpoint-*/trainer_state.json 2>/dev/null | sort -V | tail -n 1 || true)
set -- ${last:+--resume_from_checkpoint "${last%/*}"} "$@"
accelerate launch --config_file "$CONFIG" -m trl.scripts.sft \
    --model_name_or_path "$TEACHER" --dataset_name "$DATA" --output_dir "$OUT" --completion_only_loss True \
    --use_peft True --lora_r 16 --lora_alpha 32 --lora_target_modules all-linear --dtype auto \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 2 --num_train_epochs 2 \
    --learning_rate 1e-4 --lr_scheduler_type cosine --warmup_steps 20 --logging_steps 10 --report_to none \
    --save_strategy steps --save_steps 200 --save_total_limit 2 "$@"
