#!/usr/bin/env bash
# Tunes a teacher on your task by TRL's SFT, before it is distilled: a student can't learn from it what it doesn't know.
# Prerequisites: pip install -e ., GPUs by CUDA_VISIBLE_DEVICES
#   TEACHER  name or folder of the model to tune
#   DATA     folder with train.jsonl alone, rows of prompt and completion (data/README.md): only completions are trained
#   OUT      the tuned teacher's folder
# All weights in fp32, with Adam 16 bytes each. Larger teachers: --use_peft True --dtype auto, as in translate_zh_en.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
TEACHER=${TEACHER:-meta-llama/Llama-3.1-8B-Instruct}
: "${DATA:?folder with train.jsonl}"
OUT=${OUT:-runs/teacher}
CONFIG=${CONFIG:-ds_configs/ddp.yaml}

accelerate launch --config_file "$CONFIG" -m trl.scripts.sft \
    --model_name_or_path "$TEACHER" --dataset_name "$DATA" --output_dir "$OUT" --completion_only_loss True \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 2 --num_train_epochs 2 \
    --learning_rate 1e-5 --lr_scheduler_type cosine --warmup_steps 20 --logging_steps 10 \
    --save_strategy no --report_to none "$@"
