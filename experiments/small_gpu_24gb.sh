#!/usr/bin/env bash
# One GPU of 24 GB: an 8B teacher in 4 bit, a 1B student with LoRA, sequences of 1024 tokens; 20.2 GiB at the peak, 15.3 of them allocated.
# Prerequisites: pip install -e '.[quantization]'
#   STUDENT, TEACHER  names or folders of two models with one tokenizer
#   DATA              rows as in data/README.md
#   OUT               the run's folder
#   CONFIG            ds_configs/ddp.yaml for several such GPUs
set -euo pipefail
cd "$(dirname "$0")/.."
STUDENT=${STUDENT:-meta-llama/Llama-3.2-1B-Instruct}
TEACHER=${TEACHER:-meta-llama/Llama-3.1-8B-Instruct}
DATA=${DATA:-data/prompts_train.json}
OUT=${OUT:-runs/small_gpu_24gb}
CONFIG=${CONFIG:-ds_configs/single_gpu.yaml}

# 4-bit weights are unpacked for each token that is written, so many prompts at once cost little more than one.
accelerate launch --config_file "$CONFIG" train_gkd.py \
    --model_name_or_path "$STUDENT" --teacher_model_name_or_path "$TEACHER" --teacher_load_in_4bit \
    --dataset_name "$DATA" --output_dir "$OUT" \
    --lmbda 0.5 --beta 0.5 --seq_kd True --max_length 1024 --max_new_tokens 256 --generation_batch_size 32 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --gradient_checkpointing --num_train_epochs 1 \
    --learning_rate 2e-4 --lr_scheduler_type cosine --warmup_steps 0 --logging_steps 2 \
    --use_peft --lora_r 8 --lora_alpha 16 --dtype bfloat16 --bf16 \
    --save_strategy steps --save_steps 180 --save_total_limit 5 "$@"
