#!/usr/bin/env bash
# The claim: a student that trains on its own text, under its teacher's eyes, gains more than one that trains on given text.
# Makes task, teacher and student, then each cell of experiments/claim/cells.txt, with its number of seeds. After a kill the
# same command goes on. `experiments/claim.sh NAME...` runs these cells alone. What came out: experiments/RESULTS.md.
# Prerequisites: pip install -e '.[quickstart,metrics]', GPUs by CUDA_VISIBLE_DEVICES
#   OUT    models, runs, and results/ with one JSON file a cell and seed
#   SEEDS  at most so many of each cell
#   CELLS  the file of cells
#   JOBS   cells at a time on each GPU; their seconds tell something with 1 alone
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-runs/claim} SEEDS=${SEEDS:-3} JOBS=${JOBS:-1} TOKENIZERS_PARALLELISM=false TRL_EXPERIMENTAL_SILENCE=1
export GPUS=${CUDA_VISIBLE_DEVICES:-$(python -c 'import torch; print(*range(torch.cuda.device_count()), sep=",")')}
export COUNT=$(tr , '\n' <<<"$GPUS" | wc -l)
CELLS=${CELLS:-experiments/claim/cells.txt}

# What every run has, TRL's included.
export COMMON="--per_device_train_batch_size 64 --gradient_checkpointing False --dtype float32 --bf16 True
    --max_length 256 --max_new_tokens 104 --temperature 1 --lr_scheduler_type cosine --warmup_steps 10
    --logging_steps 10 --report_to none"
# How every model is measured: reasoning-gym's verifier, on text that the model samples as it would when it is served.
export MEASURE="--scorer experiments.claim.tasks:solved --eval_temperature 1 --per_device_eval_batch_size 350"

train() {  # STUDENT OUTPUT_DIR FLAGS...
    python train_gkd.py --model_name_or_path "$1" --teacher_model_name_or_path "$OUT/teacher" --teacher_dtype bfloat16 \
        --dataset_name "$OUT/data/train.jsonl" --output_dir "$2" --resume_from_checkpoint auto --preflight off $COMMON "${@:3}"
}

measure() {  # OUTPUT_DIR MODELS... -- FLAGS...
    local models=()
    local out=$1
    shift
    while [ "$1" != -- ]; do models+=("$1"); shift; done
    python eval_gkd.py --models "${models[@]}" --teacher_model_name_or_path "$OUT/teacher" --teacher_dtype bfloat16 \
        --dataset_name "$OUT/data/held_out.jsonl" --output_dir "$out" --max_length 256 --max_new_tokens 104 $MEASURE "${@:2}"
}

run() {  # NAME FOLDER SEED FLAGS...
    if [[ $1 == stock_* ]]; then  # TRL's trainer does not measure: gkd does, on its checkpoints
        [ -e "$2/trainer_state.json" ] || python experiments/claim/stock_trl.py --model_name_or_path "$OUT/student" \
            --teacher_model_name_or_path "$OUT/teacher" --dataset_name "$OUT/data/train.jsonl" --output_dir "$2" \
            --save_strategy steps --save_steps 50 --save_only_model True $COMMON --seed "${@:3}" || return 1
        measure "$2" "$2"/checkpoint-* -- --seed "$3" || return 1
    else
        train "$OUT/student" "$2" --eval_dataset_name "$OUT/data/held_out.jsonl" $MEASURE --eval_strategy steps \
            --eval_steps 150 --save_strategy steps --save_steps 200 --save_total_limit 1 \
            --teacher_text_cache "$OUT/teacher_text" --seed "${@:3}" || return 1
    fi
    measure "$OUT/greedy/$SLOT" "$2" -- --eval_temperature 0  # each slot has met the teacher once
}

start() {  # what all cells start from, and the teacher
    for temperature in 1 0; do
        measure "$OUT/start/$temperature" "$OUT/student" -- --eval_temperature $temperature
    done
}

cell() {  # NAME SEED FLAGS... or start
    local name=$1${2:+-$2}
    [ ! -e "$OUT/results/$name.json" ] || return 0
    CUDA_VISIBLE_DEVICES=$(cut -d, -f$((SLOT % COUNT + 1)) <<<"$GPUS")
    export CUDA_VISIBLE_DEVICES
    echo "$name: started"
    local work=(start)
    [ "$1" = start ] || work=(run "$1" "$OUT/cells/$name" "$2" --max_steps 300 --learning_rate 1e-4 "${@:3}")
    "${work[@]}" &>"$OUT/logs/$name.log" || { echo "$name: failed, see $OUT/logs/$name.log"; return 1; }
    python experiments/claim/collect.py "$OUT" "$name" --jobs "$JOBS" --flags "${*:3}"
    rm -rf "$OUT/cells/$name"/checkpoint-*
}
export -f train measure run start cell

mkdir -p "$OUT/results" "$OUT/logs"
[ -e "$OUT/data" ] || { python experiments/claim/tasks.py "$OUT/data.partial" && mv "$OUT/data.partial" "$OUT/data"; }
python -c 'import sys, pathlib, gkd.quickstart as q; q.fetch_teacher(pathlib.Path(sys.argv[1]))' "$OUT/base"
if [ ! -e "$OUT/teacher" ]; then
    CUDA_VISIBLE_DEVICES=$GPUS TEACHER=$OUT/base DATA=$OUT/data/teacher OUT=$OUT/teacher.partial \
        experiments/tune_teacher.sh --per_device_train_batch_size $((256 / COUNT)) --gradient_accumulation_steps 1 \
        --num_train_epochs 2 --learning_rate 8e-4 --max_length 256 --gradient_checkpointing False --dataset_num_proc 8
    mv "$OUT/teacher.partial" "$OUT/teacher"
fi
[ -e "$OUT/half" ] || python -m gkd.shrink "$OUT/base" -o "$OUT/half" --layers 15
if [ ! -e "$OUT/student" ]; then  # without half of its layers it has lost the sentences: a short SFT brings them back
    CUDA_VISIBLE_DEVICES=${GPUS%%,*} train "$OUT/half" "$OUT/warm_up" --lmbda 0 --kd_ratio 0 --learning_rate 1e-3 \
        --max_steps 250
    cp -r "$OUT/warm_up" "$OUT/student.partial" && mv "$OUT/student.partial" "$OUT/student"
fi
{
    echo start
    for seed in $(seq "$SEEDS"); do  # the first seed of each cell, then the second
        grep -v '^#' "$CELLS" | while read -r name seeds flags; do
            [[ $# -gt 0 && " $* " != *" $name "* ]] || ((seed > seeds)) || echo "$name $seed $flags"
        done
    done
} | xargs -P $((JOBS * COUNT)) --process-slot-var=SLOT -I{} bash -euo pipefail -c 'cell {}'
python experiments/claim/tables.py "$OUT/results"
