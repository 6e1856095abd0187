#!/usr/bin/env bash
# A teacher whose student has another tokenizer (experiments/other_tokenizer.py): the divergence over the tokens that both have, the
# cross-entropy of the teacher's text alone, and half of each, with as many steps on the same text; bits per byte of the teacher's text for
# held-out prompts. The same command goes on where it was stopped. Ten minutes on two CPU cores; results: experiments/RESULTS.md.
#   BASE    the teacher, by name or folder (default: SmolLM2-135M-Instruct)
#   OUT     where all goes (default: runs/other_tokenizer)
#   CONFIG  of the trainings (default: ds_configs/cpu.yaml)
# Flags behind it go to the trainings.
set -euo pipefail
cd "$(dirname "$0")/.."
BASE=${BASE:-HuggingFaceTB/SmolLM2-135M-Instruct}
OUT=${OUT:-runs/other_tokenizer}

[ -e "$OUT/held_out.json" ] || python experiments/other_tokenizer.py "$BASE" "$OUT"
distil() {  # NAME FLAGS...
    [ -f "$OUT/$1/report.html" ] || accelerate launch --quiet --config_file "${CONFIG:-ds_configs/cpu.yaml}" train_gkd.py \
        --model_name_or_path "$OUT/student" --teacher_model_name_or_path "$BASE" --cross_tokenizer shared --output_dir "$OUT/$1" \
        --dataset_name data/prompts_train.json --eval_dataset_name "$OUT/held_out.json" --eval_on_start True \
        --lmbda 0 --seq_kd True --beta 0 --max_new_tokens 48 --max_steps 40 --learning_rate 3e-4 \
        --lr_scheduler_type cosine --warmup_steps 4 --per_device_train_batch_size 8 --per_device_eval_batch_size 24 --dtype float32 \
        --bf16 False --gradient_checkpointing False --logging_steps 10 --save_strategy no --report_to none \
        --teacher_text_cache "$OUT/teacher_text" --resume_from_checkpoint auto "${@:2}"
    [ -f "$OUT/$1/report.html" ]  # a signal stops it before
}

distil divergence --kd_ratio 1 "$@"
distil half --kd_ratio 0.5 "$@"
distil cross_entropy --kd_ratio 0 "$@"

for name in divergence half cross_entropy; do
    echo "$name:"
    grep -i "bits per byte" "$OUT/$name/report.md"
done
