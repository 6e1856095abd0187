#!/usr/bin/env bash
# Tunes a teacher on your task by TRL's SFT, before it is distilled: a student can't learn from it what it doesn't know.
# The same command goes on from the last checkpoint.
# Its flags: experiments/tune_teacher.yaml. Prerequisites: pip install -e ., GPUs by CUDA_VISIBLE_DEVICES
#   TEACHER  another model to tune than there, by name or folder
#   DATA     folder with train.jsonl alone, rows of prompt and completion (data/README.md): only completions are trained
#   OUT      another folder than there for the LoRA adapter, which --teacher_adapter takes; with --use_peft False
#            --dtype float32 for the whole model (16 bytes a weight on each GPU, with Adam's states)
set -euo pipefail
cd "$(dirname "$0")/.."
: "${DATA:?folder with train.jsonl}"

last=$(ls -d "${OUT:-runs/teacher}"/checkpoint-*/trainer_state.json 2>/dev/null | sort -V | tail -n 1 || true)
exec accelerate launch --config_file "${CONFIG:-ds_configs/ddp.yaml}" -m trl.scripts.sft --config experiments/tune_teacher.yaml \
    --dataset_name "$DATA" ${TEACHER:+--model_name_or_path "$TEACHER"} ${OUT:+--output_dir "$OUT"} \
    ${last:+--resume_from_checkpoint "${last%/*}"} "$@"
