#!/usr/bin/env bash
# One GPU of 16 GB: an 8B teacher in 4 bit, a 1B student with LoRA, sequences of 1024 tokens; 14.9 GiB at the peak, 12.0 of them allocated.
# Its flags: experiments/small_gpu_16gb.yaml. Prerequisites: pip install -e '.[quantization]'
#   STUDENT, TEACHER  other models than there: names or folders of two with one tokenizer
#   DATA              other rows, as in data/README.md
#   OUT               another folder of the run
#   CONFIG            ds_configs/ddp.yaml for several such GPUs
set -euo pipefail
cd "$(dirname "$0")/.."
exec accelerate launch --config_file "${CONFIG:-ds_configs/single_gpu.yaml}" train_gkd.py --config experiments/small_gpu_16gb.yaml \
    ${STUDENT:+--model_name_or_path "$STUDENT"} ${TEACHER:+--teacher_model_name_or_path "$TEACHER"} \
    ${DATA:+--dataset_name "$DATA"} ${OUT:+--output_dir "$OUT"} "$@"
