#!/usr/bin/env bash
# Sequence-level KD: all text by the teacher, forward KL mixed with cross-entropy on it.
# Prerequisites: pip install -e '.[deepspeed]', GPUs by CUDA_VISIBLE_DEVICES
#   STUDENT, TEACHER  names or folders of two models with one tokenizer
#   DATA              rows as in data/README.md
#   OUT               the run's folder
set -euo pipefail
cd "$(dirname "$0")/.."
STUDENT=${STUDENT:-meta-llama/Llama-3.2-1B-Instruct}
TEACHER=${TEACHER:-meta-llama/Llama-3.1-8B-Instruct}
DATA=${DATA:-data/prompts_train.json}
OUT=${OUT:-runs/seq_kd}
CONFIG=${CONFIG:-ds_configs/zero2.yaml}

accelerate launch --config_file "$CONFIG" train_gkd.py \
    --model_name_or_path "$STUDENT" --teacher_model_name_or_path "$TEACHER" \
    --dataset_name "$DATA" --output_dir "$OUT" \
    --lmbda 0 --beta 0 --seq_kd True --kd_ratio 0.5 \
    --per_device_train_batch_size 3 --gradient_accumulation_steps 2 --gradient_checkpointing --num_train_epochs 1 \
    --learning_rate 2e-4 --lr_scheduler_type cosine --warmup_steps 0 --logging_steps 2 \
    --use_peft --lora_r 8 --lora_alpha 16 --dtype auto --bf16 \
    --save_strategy steps --save_steps 180 --save_total_limit 5 "$@"
