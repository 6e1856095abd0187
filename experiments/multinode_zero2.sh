#!/usr/bin/env bash
# Several machines, ZeRO-2. Run on each: NODES=2 RANK=0|1 MASTER=host:port experiments/multinode_zero2.sh
# Prerequisites: pip install -e '.[deepspeed]' on every machine, the repository at one path, OUT on a shared disk
#   STUDENT, TEACHER  names or folders of two models with one tokenizer
#   DATA              rows as in data/README.md
#   OUT               the run's folder
#   GPUS              on each machine (default: all)
#   DEEPSPEED         its configuration; empty: DDP, on machines without a GPU over gloo
set -euo pipefail
cd "$(dirname "$0")/.."
STUDENT=${STUDENT:-meta-llama/Llama-3.2-1B-Instruct}
TEACHER=${TEACHER:-meta-llama/Llama-3.1-8B-Instruct}
DATA=${DATA:-data/prompts_train.json}
OUT=${OUT:-runs/multinode_zero2}
: "${NODES:?number of machines}" "${RANK:?this machine, from 0}" "${MASTER:?host:port of machine 0}"
GPUS=${GPUS:-$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')}
DEEPSPEED=${DEEPSPEED-ds_configs/zero2.json}
set -- ${DEEPSPEED:+--deepspeed "$DEEPSPEED"} "$@"

# A machine that dies takes the others with it; start all of them again with --resume_from_checkpoint auto.
torchrun --nnodes "$NODES" --node_rank "$RANK" --nproc_per_node "$GPUS" \
    --master_addr "${MASTER%:*}" --master_port "${MASTER##*:}" train_gkd.py \
    --model_name_or_path "$STUDENT" --teacher_model_name_or_path "$TEACHER" \
    --dataset_name "$DATA" --output_dir "$OUT" \
    --lmbda 0.5 --beta 0.5 --seq_kd True \
    --per_device_train_batch_size 3 --gradient_accumulation_steps 2 --gradient_checkpointing --num_train_epochs 1 \
    --learning_rate 2e-4 --lr_scheduler_type cosine --warmup_steps 0 --logging_steps 2 \
    --use_peft --lora_r 8 --lora_alpha 16 --dtype auto --bf16 \
    --save_strategy steps --save_steps 180 --save_total_limit 5 "$@"
