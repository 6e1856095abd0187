#!/usr/bin/env bash
# A teacher whose student has another tokenizer (experiments/other_tokenizer.py), on the teacher's own answers, with as many steps each:
# the divergence over the tokens that both have, half of it beside the cross-entropy of the text, the cross-entropy alone, GOLD's loss, and
# TRL's GOLD trainer itself (experiments/gold.py). Then bits per byte of the teacher's text for held-out prompts, of all of them, and
# seconds a step. The same command goes on where it was stopped. Three quarters of an hour of one CPU core with PROMPTS=184, --max_steps 24 and
# without half; results: experiments/RESULTS.md.
#   BASE    the teacher, by name or folder (default: SmolLM2-135M-Instruct)
#   OUT     where all goes (default: runs/other_tokenizer)
#   CONFIG  of the trainings (default: ds_configs/cpu.yaml; on a GPU ds_configs/single_gpu.yaml)
#   RUNS    which of them (default: shared half cross_entropy uld gold)
#   PROMPTS of data/ that the teacher answers (default: 368, all)
# Flags behind it that gkd and TRL both know go to the trainings, such as --max_steps 24.
set -euo pipefail
cd "$(dirname "$0")/.."
BASE=${BASE:-HuggingFaceTB/SmolLM2-135M-Instruct}
OUT=${OUT:-runs/other_tokenizer}
RUNS=${RUNS:-shared half cross_entropy uld gold}

[ -e "$OUT/held_out.json" ] || python experiments/other_tokenizer.py "$BASE" "$OUT" --prompts "${PROMPTS:-368}"
distil() {  # NAME FLAGS...
    accelerate launch --quiet --config_file "${CONFIG:-ds_configs/cpu.yaml}" train_gkd.py \
        --model_name_or_path "$OUT/student" --teacher_model_name_or_path "$BASE" --output_dir "$OUT/$1" \
        --dataset_name "$OUT/train.json" --lmbda 0 --max_new_tokens 64 --beta 0 --max_steps 40 --learning_rate 3e-4 \
        --lr_scheduler_type cosine --warmup_steps 4 --per_device_train_batch_size 8 --logging_steps 10 --dtype float32 \
        --teacher_dtype float32 --bf16 False --gradient_checkpointing False --save_strategy no --report_to none --resume_from_checkpoint auto "${@:2}"
}

for run in $RUNS; do
    [ -f "$OUT/$run/trainer_state.json" ] || case $run in
        shared) distil shared --cross_tokenizer shared "$@" ;;
        half) distil half --cross_tokenizer shared --kd_ratio 0.5 "$@" ;;
        cross_entropy) distil cross_entropy --cross_tokenizer shared --kd_ratio 0 "$@" ;;
        uld) distil uld --cross_tokenizer uld "$@" ;;
        gold) accelerate launch --quiet --config_file "${CONFIG:-ds_configs/cpu.yaml}" experiments/gold.py \
            "$OUT/student" "$BASE" "$OUT/train.json" "$OUT/gold" --beta 0 --max_steps 40 --learning_rate 3e-4 \
            --lr_scheduler_type cosine --warmup_steps 4 --per_device_train_batch_size 8 --logging_steps 10 "$@" ;;
        *) echo "RUNS: $run is none of shared, half, cross_entropy, uld and gold." >&2; exit 2 ;;
    esac
    [ -f "$OUT/$run/trainer_state.json" ]  # a signal stops it before
done
python eval_gkd.py --models "$OUT/student" $(for run in $RUNS; do echo "$OUT/$run"; done) --teacher_model_name_or_path "$BASE" \
    --cross_tokenizer shared --dataset_name "$OUT/held_out.json" --output_dir "$OUT/evaluation" --max_new_tokens 64 --dtype float32 \
    --per_device_eval_batch_size 24 --beta 0
python - "$OUT" $RUNS <<'PY'
import json, sys
from pathlib import Path
for run in sys.argv[2:]:
    state = json.loads(Path(sys.argv[1], run, "trainer_state.json").read_text())
    seconds = next(log["train_runtime"] for log in reversed(state["log_history"]) if "train_runtime" in log)
    print(f"{run}: {seconds / state['max_steps']:.2f} seconds a step")
PY
