#!/usr/bin/env bash
# One GPU: 4-bit teacher and 4-bit student with LoRA.
# Prerequisites: pip install -e '.[quantization]'
#   STUDENT, TEACHER  names or folders of two models with one tokenizer
#   DATA              rows as in data/README.md
#   OUT               the run's folder
set -euo pipefail
cd "$(dirname "$0")/.."
STUDENT=${STUDENT:-meta-llama/Llama-3.2-1B-Instruct}
TEACHER=${TEACHER:-meta-llama/Llama-3.1-8B-Instruct}
DATA=${DATA:-data/prompts_train.json}
OUT=${OUT:-runs/qlora_single_gpu}

accelerate launch --config_file ds_configs/single_gpu.yaml train_gkd.py \
    --model_name_or_path "$STUDENT" --teacher_model_name_or_path "$TEACHER" \
    --dataset_name "$DATA" --output_dir "$OUT" \
    --lmbda 0.5 --beta 0.5 --seq_kd True --load_in_4bit --teacher_load_in_4bit --dtype bfloat16 --bf16 \
    --use_peft --lora_r 8 --lora_alpha 16 --learning_rate 2e-4 --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 4 --gradient_checkpointing --logging_steps 2 "$@"
