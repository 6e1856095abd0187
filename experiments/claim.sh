#!/usr/bin/env bash
# The claim: a student that trains on its own text, under its teacher's eyes, gains more than one that trains on given text.
# Makes task, teacher and student, then each cell of experiments/claim/cells.txt, with its number of seeds. After a kill the
# same command goes on. `experiments/claim.sh NAME...` runs these cells alone, `start` none of them. What came out: experiments/RESULTS.md.
# Prerequisites: pip install -e '.[quickstart,metrics]', GPUs by CUDA_VISIBLE_DEVICES
#   OUT            models, runs, and results/cells.jsonl with a line a cell and seed (to make one anew, delete its cells/ folder too)
#   ROWS           the student's prompts of each task
#   WARM_UP        steps of SFT on them, before any cell
#   LEARNING_RATE  other than 3e-4; the names of cells tell it: on_policy_jsd_lr_1e-4
#   STEPS          of a cell, where its flags have no other
#   SAVE_STEPS     between the checkpoints, whose sampled text is measured, the last one's greedy too (half of STEPS; more: the last alone)
#   SEEDS          at most so many of each cell
#   CELLS          the file of cells
#   JOBS           cells at a time on each GPU; their seconds tell something with 1 alone, and of those that write text three at a
#                  time take three times as long each
#   SCORER         MODULE:FUNCTION that says whether an answer is right
#   LENGTHS        limits of prompts and answers
set -euo pipefail
cd "$(dirname "$0")/.."
trap 'exit 130' INT TERM
export OUT=${OUT:-runs/claim} STEPS=${STEPS:-300} SEEDS=${SEEDS:-3} JOBS=${JOBS:-1}
export SAVE_STEPS=${SAVE_STEPS:-$((STEPS / 2))}
export TOKENIZERS_PARALLELISM=false TRL_EXPERIMENTAL_SILENCE=1
GPUS=${CUDA_VISIBLE_DEVICES:-$(python -c 'import torch; print(*range(torch.cuda.device_count()), sep=",")')}
COUNT=$(tr , '\n' <<<"$GPUS" | wc -l)
ROWS=${ROWS:-1000}
WARM_UP=${WARM_UP:-250}
CELLS=${CELLS:-experiments/claim/cells.txt}
export GPUS COUNT

# What every training has, TRL's included.
export COMMON="--per_device_train_batch_size 64 --gradient_checkpointing False --dtype float32 --bf16 True
    --temperature 1 --lr_scheduler_type cosine --warmup_steps 10 --logging_steps 10 --report_to none"
export LENGTHS=${LENGTHS:---max_length 256 --max_new_tokens 104}  # and every measurement
export SCORER=${SCORER:-experiments.claim.tasks:solved}

train() {  # STUDENT OUTPUT_DIR FLAGS...
    [ -e "$2/trainer_state.json" ] || python train_gkd.py --model_name_or_path "$1" \
        --teacher_model_name_or_path "$OUT/teacher" --teacher_dtype bfloat16 --dataset_name "$OUT/data/train.jsonl" \
        --output_dir "$2" --resume_from_checkpoint auto --preflight off $COMMON $LENGTHS "${@:3}" || return 1
    [ -e "$2/trainer_state.json" ]  # a signal stops it before, which is no error of its own
}

peer() {  # OUTPUT_DIR FLAGS...: TRL's trainer
    [ -e "$1/trainer_state.json" ] || python experiments/claim/stock_trl.py --model_name_or_path "$OUT/student" \
        --teacher_model_name_or_path "$OUT/teacher" --dataset_name "$OUT/data/train.jsonl" --output_dir "$1" \
        --save_only_model True $COMMON $LENGTHS "${@:2}"
}

measure() {  # OUTPUT_DIR TEMPERATURE SEED MODELS...: all models alike, in bf16 as they are served, by the task's verifier
    local known=$OUT/measured/start-$3/${1##*/}/evaluation/rows
    if [ ! -e "$1" ] && [ -e "$known" ]; then  # rows that are done are kept: here, those of the teacher
        mkdir -p "$1/evaluation"
        cp -r "$known" "$1/evaluation/rows"
    fi
    python eval_gkd.py --models "${@:4}" --dtype bfloat16 --teacher_model_name_or_path "$OUT/teacher" \
        --teacher_dtype bfloat16 --dataset_name "$OUT/data/held_out.jsonl" --output_dir "$1" --eval_temperature "$2" \
        --seed "$3" --scorer "$SCORER" $LENGTHS --per_device_eval_batch_size 500
}

work() {  # NAME SEED FLAGS...
    local run=$OUT/cells/$1-$2 measured=$OUT/measured/$1-$2 models=("$OUT/student")
    if [ "$1" != start ]; then
        local flags=(--max_steps $STEPS --learning_rate 3e-4 --save_strategy steps --save_steps $SAVE_STEPS --seed "$2" "${@:3}")
        if [[ $1 == stock_* ]]; then
            peer "$run" "${flags[@]}" || return 1
        else
            train "$OUT/student" "$run" --teacher_text_cache "$OUT/teacher_text" "${flags[@]}" || return 1
        fi
        [[ $1 != *_timed ]] || return 0
        mapfile -t models < <(ls -d "$run"/checkpoint-* | sort -V)
    fi
    measure "$measured/sampled" 1 "$2" "${models[@]}" || return 1
    measure "$measured/greedy" 0 "$2" "${models[-1]}" || return 1
}

cell() {  # NAME SEED FLAGS...
    local name=$1-$2
    ! grep -sqF "\"cell\": \"$1\", \"seed\": $2," "$OUT/results/cells.jsonl" || return 0
    CUDA_VISIBLE_DEVICES=$(cut -d, -f$((SLOT % COUNT + 1)) <<<"$GPUS")
    export CUDA_VISIBLE_DEVICES
    echo "$name: started"
    work "$@" &>"$OUT/logs/$name.log" || { echo "$name: failed, see $OUT/logs/$name.log"; return 1; }
    python experiments/claim/collect.py "$OUT" "$name" --jobs "$JOBS" --flags "${*:3}"
    rm -rf "$OUT/cells/$name"/checkpoint-*
}
export -f train peer measure work cell

list() {  # NAMES...: the cells to run, the first seed of each before the second
    printf 'start %d\n' $(seq "$SEEDS")
    for seed in $(seq "$SEEDS"); do
        grep -v '^#' "$CELLS" | while read -r name seeds flags; do
            [[ $# -gt 0 && " $* " != *" $name "* ]] || ((seed > seeds)) ||
                echo "$name${LEARNING_RATE:+_lr_$LEARNING_RATE} $seed $flags${LEARNING_RATE:+ --learning_rate $LEARNING_RATE}"
        done
    done
}

for name in "$@"; do
    [ "$name" = start ] || grep -q "^$name " "$CELLS" || { echo "$name is not in $CELLS"; exit 1; }
done
mkdir -p "$OUT/results" "$OUT/logs"
if [ ! -e "$OUT/data" ]; then
    python experiments/claim/tasks.py "$OUT/data.partial" --train "$ROWS"
    mv "$OUT/data.partial" "$OUT/data"
fi
python -c 'import sys, pathlib; from experiments import quickstart; quickstart.fetch_teacher(pathlib.Path(sys.argv[1]))' "$OUT/base"
if [ ! -e "$OUT/teacher" ]; then
    CUDA_VISIBLE_DEVICES=$GPUS TEACHER=$OUT/base DATA=$OUT/data/teacher OUT=$OUT/teacher.partial \
        experiments/tune_teacher.sh --use_peft False --dtype float32 --learning_rate 8e-4 --num_train_epochs 2 \
        --per_device_train_batch_size $((256 / COUNT)) --gradient_accumulation_steps 1 --max_length 256 \
        --gradient_checkpointing False --dataset_num_proc 8 --save_strategy no
    mv "$OUT/teacher.partial" "$OUT/teacher"
fi
# Every second layer, as in what RESULTS.md reports; `gkd shrink` has since learnt to choose better ones.
[ -e "$OUT/half" ] || python - "$OUT/base" "$OUT/half" <<'END'
import sys
from pathlib import Path
from transformers import AutoTokenizer
from gkd.io.files import appearing
from gkd.models.loading import load_pretrained
from gkd.models.shrink import shrink

base, half = sys.argv[1:]
model = load_pretrained(base, dtype="auto")
shrink(model, [round(i * 29 / 14) for i in range(15)])
with appearing(Path(half)) as folder:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
END
# Without half of its layers the student has lost the sentences: a short SFT brings them back.
CUDA_VISIBLE_DEVICES=${GPUS%%,*} train "$OUT/half" "$OUT/student" --lmbda 0 --kd_ratio 0 --learning_rate 1e-3 --max_steps "$WARM_UP"

list "$@" | xargs -P $((JOBS * COUNT)) --process-slot-var=SLOT -I{} bash -euo pipefail -c 'cell {}'
python experiments/claim/tables.py "$OUT/results"
