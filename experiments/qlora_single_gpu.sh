#!/usr/bin/env bash
# One GPU: 4-bit teacher and 4-bit student with LoRA.
# Its flags: experiments/qlora_single_gpu.yaml. Prerequisites: pip install -e '.[quantization]'
#   STUDENT, TEACHER  other models than there: names or folders of two with one tokenizer
#   DATA              other rows, as in data/README.md
#   OUT               another folder of the run
set -euo pipefail
cd "$(dirname "$0")/.."
exec accelerate launch --config_file ds_configs/single_gpu.yaml train_gkd.py --config experiments/qlora_single_gpu.yaml \
    ${STUDENT:+--model_name_or_path "$STUDENT"} ${TEACHER:+--teacher_model_name_or_path "$TEACHER"} \
    ${DATA:+--dataset_name "$DATA"} ${OUT:+--output_dir "$OUT"} "$@"
