#!/usr/bin/env bash
# Supervised KD: forward KL on the answers of the dataset, which must have them.
# Its flags: experiments/supervised_kld.yaml. Prerequisites: pip install -e '.[deepspeed]', GPUs by CUDA_VISIBLE_DEVICES
#   STUDENT, TEACHER  other models than there: names or folders of two with one tokenizer
#   DATA              other rows, as in data/README.md
#   OUT               another folder of the run
#   CONFIG            another configuration of accelerate's, from ds_configs/
set -euo pipefail
cd "$(dirname "$0")/.."
exec accelerate launch --config_file "${CONFIG:-ds_configs/zero2.yaml}" train_gkd.py --config experiments/supervised_kld.yaml \
    ${STUDENT:+--model_name_or_path "$STUDENT"} ${TEACHER:+--teacher_model_name_or_path "$TEACHER"} \
    ${DATA:+--dataset_name "$DATA"} ${OUT:+--output_dir "$OUT"} "$@"
