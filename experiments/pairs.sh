#!/usr/bin/env bash
# What `gkd diagnose` says of six pairs, beside what training then gives: three small tasks, made here with their models
# (experiments/pairs.py), a weak and a stronger student of each. From there as many steps on given answers (λ = 0, β = 0) and on
# the student's own (λ = 1, β = 0.5). The same command goes on where it was stopped. An hour and a half on one CPU core.
#   OUT    where all goes (default: runs/pairs)
#   STEPS  of each of both trainings
#   SEED   of both trainings
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/pairs}
STEPS=${STEPS:-150}
SEED=${SEED:-1}

train() {  # STUDENT TEACHER OUT ROWS FLAGS...
    [ -e "$3/trainer_state.json" ] || python train_gkd.py --model_name_or_path "$1" --teacher_model_name_or_path "$2" \
        --dataset_name "$4" --output_dir "$3.partial" --preflight off --max_length 256 --max_new_tokens 128 \
        --per_device_train_batch_size 32 --gradient_checkpointing False --lr_scheduler_type cosine --warmup_steps 20 \
        --logging_steps 25 --save_strategy no --resume_from_checkpoint auto --report_to none --temperature 1 "${@:5}"
    [ -e "$3/trainer_state.json" ] || { [ -e "$3.partial/trainer_state.json" ]  # a signal stops it before
        mv "$3.partial" "$3"; }
}

sft() {  # MODEL OUT ROWS STEPS
    train "$1" "$1" "$2" "$3" --lmbda 0 --kd_ratio 0 --learning_rate 3e-3 --max_steps "$4"
}

pair() {  # TASK STEPS: a student after so many steps of SFT
    local task=$OUT/$1 place=$OUT/$1/pair_$2
    sft "$task/student_init" "$place/student" "$task/train.jsonl" "$2"
    [ -e "$place/diagnosis/diagnosis.json" ] || python -m gkd diagnose "$place/student" "$task/teacher" "$task/held_out.jsonl" \
        --output_dir "$place/diagnosis" --scorer experiments.pairs:solved --max_rows 100 --eval_temperature 1 \
        --max_length 256 --max_new_tokens 128
    local common=(--learning_rate 1e-3 --max_steps "$STEPS" --seed "$SEED" --eval_dataset_name "$task/held_out.jsonl"
        --scorer experiments.pairs:solved --eval_temperature 1 --per_device_eval_batch_size 200)
    train "$place/student" "$task/teacher" "$place/supervised" "$task/train.jsonl" --lmbda 0 --beta 0 "${common[@]}"
    train "$place/student" "$task/teacher" "$place/on_policy" "$task/train.jsonl" --lmbda 1 --beta 0.5 "${common[@]}"
}

task() {  # TASK TEACHER-STEPS WEAK STRONG
    [ -e "$OUT/$1/student_init" ] || python experiments/pairs.py make "$OUT" "$1"
    sft "$OUT/$1/teacher_init" "$OUT/$1/teacher" "$OUT/$1/teacher.jsonl" "$2"
    pair "$1" "$3"
    pair "$1" "$4"
}

task reverse 1200 300 600
task sums 1200 200 500
task packing 1500 300 900
python experiments/pairs.py table "$OUT"
