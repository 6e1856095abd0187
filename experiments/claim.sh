#!/usr/bin/env bash
# The claim: students that train on their own text, under the teacher's eyes, gain more than those that train on given text.
# Task, teacher, student, and each cell of experiments/claim/cells.txt, those that are finished left out: after a kill the
# same command goes on. `experiments/claim.sh NAME...` runs these cells alone.
# Prerequisites: pip install -e '.[quickstart,metrics]', GPUs by CUDA_VISIBLE_DEVICES
#   OUT    models, runs and results
#   SEEDS  the first so many of each cell (default: as many as the cell has)
#   JOBS   cells at a time on each GPU: seconds are right with 1 alone
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-runs/claim} SEEDS=${SEEDS:-9} JOBS=${JOBS:-1} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export TOKENIZERS_PARALLELISM=false TRL_EXPERIMENTAL_SILENCE=1
GPUS=${CUDA_VISIBLE_DEVICES:-$(python -c 'import torch; print(*range(torch.cuda.device_count()), sep=",")')}
export GPUS

# What all runs share. TRL's trainer gets the same.
common() {
    echo --per_device_train_batch_size 64 --gradient_checkpointing False --dtype float32 --bf16 True \
        --max_length 256 --max_new_tokens 128 --temperature 1 --lr_scheduler_type cosine --warmup_steps 10 \
        --logging_steps 10 --report_to none
}

train() {  # STUDENT OUTPUT_DIR FLAGS...
    python train_gkd.py --model_name_or_path "$1" --teacher_model_name_or_path "$OUT/teacher" --teacher_dtype bfloat16 \
        --dataset_name "$OUT/data/train.jsonl" --output_dir "$2" --eval_dataset_name "$OUT/data/held_out.jsonl" \
        --scorer experiments.claim.tasks:solved --per_device_eval_batch_size 350 --preflight off \
        --resume_from_checkpoint auto $(common) "${@:3}"
}

peer() {  # OUTPUT_DIR FLAGS...: TRL's trainer leaves checkpoints, which eval_gkd.py then measures as gkd does itself
    [ -e "$1/trainer_state.json" ] || python experiments/claim/stock_trl.py --model_name_or_path "$OUT/student" \
        --teacher_model_name_or_path "$OUT/teacher" --dataset_name "$OUT/data/train.jsonl" --output_dir "$1" \
        --save_strategy steps --save_steps 100 --save_only_model True $(common) "${@:2}"
    python eval_gkd.py --models "$1"/checkpoint-* --teacher_model_name_or_path "$OUT/teacher" --teacher_dtype bfloat16 \
        --dataset_name "$OUT/data/held_out.jsonl" --output_dir "$1" --scorer experiments.claim.tasks:solved \
        --per_device_eval_batch_size 350 --max_length 256 --max_new_tokens 128
}

cell() {  # NAME SEED FLAGS...
    local run="$OUT/cells/$1-$2" result="$OUT/results/$1-$2.json"
    [ -e "$result" ] && return
    export CUDA_VISIBLE_DEVICES=$(cut -d, -f$((SLOT % $(tr , '\n' <<<"$GPUS" | wc -l) + 1)) <<<"$GPUS")
    mkdir -p "$OUT/logs"
    local flags=(--max_steps 300 --learning_rate 1e-4 --seed "$2" "${@:3}")
    if [[ $1 == stock_* ]]; then
        peer "$run" "${flags[@]}"
    else
        train "$OUT/student" "$run" --eval_strategy steps --eval_steps 50 --save_strategy steps --save_steps 100 \
            --save_total_limit 1 --teacher_text_cache "$OUT/teacher_text" "${flags[@]}"
    fi &>"$OUT/logs/$1-$2.log" || { tail -n 5 "$OUT/logs/$1-$2.log"; return 1; }
    python experiments/claim/collect.py "$run" "$result" "${flags[@]}"
}
export -f common train peer cell

mkdir -p "$OUT/results"
[ -e "$OUT/data" ] || { python experiments/claim/tasks.py "$OUT/data.partial" && mv "$OUT/data.partial" "$OUT/data"; }
python -c 'import sys; from pathlib import Path; from gkd.quickstart import fetch_teacher; fetch_teacher(Path(sys.argv[1]))' "$OUT/base"
if [ ! -e "$OUT/teacher" ]; then
    count=$(tr , '\n' <<<"$GPUS" | wc -l)
    CUDA_VISIBLE_DEVICES=$GPUS TEACHER=$OUT/base DATA=$OUT/data/teacher OUT=$OUT/teacher.partial \
        experiments/tune_teacher.sh --per_device_train_batch_size $((256 / count)) --gradient_accumulation_steps 1 \
        --num_train_epochs 3 --learning_rate 8e-4 --max_length 256 --gradient_checkpointing False --dataset_num_proc 8
    mv "$OUT/teacher.partial" "$OUT/teacher"
fi
[ -e "$OUT/half" ] || python -m gkd.shrink "$OUT/base" -o "$OUT/half" --layers 15
if [ ! -e "$OUT/student" ]; then  # half of the layers have lost the sentences: a short SFT brings them back
    CUDA_VISIBLE_DEVICES=${GPUS%%,*} train "$OUT/half" "$OUT/warm_up" --lmbda 0 --kd_ratio 0 --learning_rate 5e-4 \
        --max_steps 150 --save_strategy no
    cp -r "$OUT/warm_up" "$OUT/student.partial" && mv "$OUT/student.partial" "$OUT/student"
fi

grep -v '^#' experiments/claim/cells.txt | while read -r name seeds flags; do
    [[ $# -gt 0 && " $* " != *" $name "* ]] && continue
    for seed in $(seq $((seeds < SEEDS ? seeds : SEEDS))); do echo "$name $seed $flags"; done
done | xargs -P $((JOBS * $(tr , '\n' <<<"$GPUS" | wc -l))) --process-slot-var=SLOT -I{} bash -euo pipefail -c 'cell {}'
python experiments/claim/tables.py "$OUT/results"
