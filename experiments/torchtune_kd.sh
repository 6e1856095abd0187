#!/usr/bin/env bash
# Counterpart of torchtune's knowledge_distillation_distributed: 0.9 cross-entropy + 0.1 forward KL, LoRA on head too.
# Prerequisites: pip install -e '.[deepspeed]', GPUs by CUDA_VISIBLE_DEVICES
#   STUDENT, TEACHER  names or folders of two models with one tokenizer
#   DATA              rows as in data/README.md
#   OUT               the run's folder
set -euo pipefail
cd "$(dirname "$0")/.."
STUDENT=${STUDENT:-meta-llama/Llama-3.2-1B-Instruct}
TEACHER=${TEACHER:-meta-llama/Llama-3.1-8B-Instruct}
DATA=${DATA:-data/sample_answers.json}
OUT=${OUT:-runs/torchtune_kd}
CONFIG=${CONFIG:-ds_configs/zero2.yaml}

# torchtune's flags: optimizer.lr=10e-5 kd_ratio=0.1 batch_size=2 lora_rank=8 lora_alpha=16 apply_lora_to_output=True
# lora_attn_modules=[q_proj,v_proj,output_proj,k_proj] epochs=3. An alpaca file becomes rows by convert_data.py.
accelerate launch --config_file "$CONFIG" train_gkd.py \
    --model_name_or_path "$STUDENT" --teacher_model_name_or_path "$TEACHER" \
    --dataset_name "$DATA" --output_dir "$OUT" \
    --lmbda 0 --beta 0 --kd_ratio 0.1 --train_on last_turn \
    --learning_rate 10e-5 --per_device_train_batch_size 2 --num_train_epochs 3 --warmup_steps 0 \
    --use_peft --lora_r 8 --lora_alpha 16 --lora_target_modules q_proj v_proj o_proj k_proj lm_head \
    --dtype auto --bf16 --gradient_checkpointing --logging_steps 1 "$@"
