#!/usr/bin/env bash
# What `gkd diagnose` says of six pairs of a teacher and a student, beside what trainings then gain: supervised KD, and half of the
# steps on-policy. The task is that of claim_long.sh, smaller, and so are the models (experiments/claim/small.py). Teachers differ in what
# they were tuned on: clean answers alone, also behind wrong moves, also behind boxes that do not follow; students in their number of
# rows. The same command goes on where it was stopped. Half an hour on two CPU cores that others share; results: experiments/RESULTS.md.
#   OUT    where all goes (default: runs/diagnosis_pairs)
#   PAIRS  TEACHER-ROWS of each (teachers: clean, moves, boxes)
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/diagnosis_pairs}
PAIRS=${PAIRS:-clean-250 clean-500 clean-1000 boxes-250 boxes-500 boxes-1000}
TASK="--items 4 --kinds 3"
LENGTHS="--max_length 256 --max_new_tokens 128"
SCORER=experiments.claim.packing:solved

declare -A SEEN=([clean]="clean" [moves]="clean recovery perturbed" [boxes]="clean recovery perturbed garbled")

teacher() {  # NAME
    [ ! -e "$OUT/teachers/$1" ] || return 0
    python experiments/claim/packing.py "$OUT/data/$1" --teacher "$OUT/deep" $TASK --rows ${SEEN[$1]}
    TEACHER=$OUT/deep DATA=$OUT/data/$1/teacher OUT=$OUT/teachers/$1.partial CONFIG=ds_configs/cpu.yaml \
        experiments/tune_teacher.sh --use_peft False --dtype float32 --bf16 False --learning_rate 2e-3 --max_steps 1400 \
        --per_device_train_batch_size 32 --gradient_accumulation_steps 1 --gradient_checkpointing False --save_strategy no \
        --logging_steps 100 --disable_tqdm True
    mv "$OUT/teachers/$1.partial" "$OUT/teachers/$1"
}

train() {  # STUDENT TEACHER ROWS OUTPUT_DIR FLAGS...
    [ -e "$4/trainer_state.json" ] || python train_gkd.py --model_name_or_path "$1" --teacher_model_name_or_path "$2" \
        --dataset_name "$OUT/data/$3/train.jsonl" --output_dir "$4" --preflight off --report_to none --dtype float32 --bf16 False \
        --per_device_train_batch_size 32 --gradient_checkpointing False --temperature 1 --lr_scheduler_type cosine \
        --warmup_steps 10 --logging_steps 20 --save_strategy no --resume_from_checkpoint auto \
        --disable_tqdm True $LENGTHS "${@:5}"
}

pair() {  # TEACHER ROWS
    local teacher=$OUT/teachers/$1 student=$OUT/students/$2/student folder=$OUT/pairs/$1-$2 kind
    local held_out=$OUT/data/$2/held_out.jsonl
    teacher "$1"
    [ -e "$OUT/data/$2" ] || python experiments/claim/packing.py "$OUT/data/$2" $TASK --train "$2"
    train "$OUT/shallow" "$teacher" "$2" "$student" --lmbda 0 --kd_ratio 0 --learning_rate 2e-3 --max_steps 700
    [ -e "$folder/diagnosis/diagnosis.json" ] || python -m gkd diagnose "$student" "$teacher" "$held_out" --eval_temperature 1 \
        --output_dir "$folder/diagnosis" --scorer "$SCORER" --max_rows 200 --dtype float32 --teacher_dtype float32 $LENGTHS
    train "$student" "$teacher" "$2" "$folder/supervised" --lmbda 0 --beta 0 --learning_rate 5e-4 --max_steps 250
    train "$student" "$teacher" "$2" "$folder/mixed" --lmbda 0.5 --beta 0.5 --learning_rate 5e-4 --max_steps 250
    for kind in sampled greedy; do
        python eval_gkd.py --models "$student" "$folder/supervised" "$folder/mixed" --teacher_model_name_or_path "$teacher" \
            --dataset_name "$held_out" --output_dir "$folder/measured/$kind" --dtype float32 --teacher_dtype float32 \
            --eval_temperature "$([ $kind = sampled ] && echo 1 || echo 0)" --scorer "$SCORER" $LENGTHS \
            --per_device_eval_batch_size 250
    done
}

[ -e "$OUT/shallow" ] || python -m experiments.claim.small "$OUT"
for name in $PAIRS; do
    pair "${name%-*}" "${name#*-}"
done
python -m experiments.claim.small --table "$OUT"
