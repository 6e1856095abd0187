#!/usr/bin/env bash
# The claim at length: the comparison of experiments/claim.sh on a task whose answers have some 280 tokens, and whose errors can be
# mended (experiments/claim/packing.py). After a kill the same command goes on. `experiments/claim_long.sh STAGE...` does these
# stages alone, in their order:
#   gate      task, teacher and student, and whether the teacher can help behind the student's errors: if not, nothing follows
#   main      supervised KD and half of the steps on-policy; the best β with three seeds, --lmbda auto beside it
#   equal     seconds of a step, TRL's trainer beside ours, and supervised KD in the GPU seconds of main's best
#   others    other β, seq_kd, the student's own text alone, rows that show how to mend
#   horizons  answers of half and of twice the length, from students of as many rows
#   few       answers to a twentieth of the prompts
#   seven     the gate's figure on the seven tasks of claim.sh, beside which it can be read
# Prerequisites: pip install -e '.[quickstart,metrics]', a GPU by CUDA_VISIBLE_DEVICES; claim.sh tells LEARNING_RATE and JOBS
#   OUT      models and data; OUT/ITEMS of each length, as claim.sh leaves it
#   ITEMS    of an order, at the main length
#   ROWS     the student's; several: the first with which SFT brings it to MINIMUM
#   MINIMUM  of the sampled answers of the student at the start are right; with 0.4, greedy ones leave nothing to gain
#   WARM_UP  steps of SFT, enough for it to gain no more
set -euo pipefail
cd "$(dirname "$0")/.."
trap 'exit 130' INT TERM
export LONG=${OUT:-runs/claim_long}
ITEMS=${ITEMS:-10}
ROWS=${ROWS:-500 1000 2000 4000}
MINIMUM=${MINIMUM:-0.15}
export WARM_UP=${WARM_UP:-400} STEPS=${STEPS:-200} SAVE_STEPS=${SAVE_STEPS:-1000} CELLS=${CELLS:-experiments/claim/long_cells.txt}
export SCORER=experiments.claim.packing:solved

lengths() {  # ITEMS: 28 tokens a line, and seven more lines for each ten to mend what went wrong
    local new=$(($1 * 48 + 8))
    echo "--max_new_tokens $new --max_length $((new + 128))"
}

claim() {  # FOLDER ITEMS NAMES...
    OUT=$1 LENGTHS=$(lengths "$2") experiments/claim.sh "${@:3}"
}

choose() {  # WHAT FOLDER MORE...
    python experiments/claim/choices.py "$@"
}

at_least() {  # NUMBER MINIMUM
    python -c 'import sys; sys.exit(not float(sys.argv[1]) >= float(sys.argv[2]))' "$@"
}

models() {  # base and teacher, of all lengths
    python -c 'import sys, pathlib; from experiments import quickstart; quickstart.fetch_teacher(pathlib.Path(sys.argv[1]))' "$LONG/base"
    [ ! -e "$LONG/teacher" ] || return 0
    python experiments/claim/packing.py "$LONG/data" --teacher "$LONG/base" --items $((ITEMS / 2)) "$ITEMS" $((ITEMS * 2))
    TEACHER=$LONG/base DATA=$LONG/data/teacher OUT=$LONG/teacher.partial \
        experiments/tune_teacher.sh --use_peft False --dtype float32 --learning_rate 5e-4 --num_train_epochs 1 \
        --per_device_train_batch_size 64 --gradient_accumulation_steps 1 --max_length 1152 \
        --train_sampling_strategy group_by_length --use_liger_kernel True --gradient_checkpointing False \
        --dataset_num_proc 8 --save_strategy no
    mv "$LONG/teacher.partial" "$LONG/teacher"
}

folder() {  # FOLDER ITEMS ROWS: with data and the models of all
    mkdir -p "$1"
    ln -sfn "$(realpath "$LONG/base")" "$1/base"
    ln -sfn "$(realpath "$LONG/teacher")" "$1/teacher"
    [ -e "$1/data" ] || python experiments/claim/packing.py "$1/data.partial" --items "$2" --train "$3"
    [ -e "$1/data" ] || mv "$1/data.partial" "$1/data"
}

student() {  # the main length's, with as few rows as do
    [ ! -e "$LONG/$ITEMS" ] || return 0
    local rows accuracy
    for rows in $ROWS; do
        folder "$LONG/rows/$rows" "$ITEMS" "$rows"
        claim "$LONG/rows/$rows" "$ITEMS" start
        accuracy=$(choose start "$LONG/rows/$rows/results")
        echo "With $rows rows SFT brings the student to $accuracy."
        if at_least "$accuracy" "$MINIMUM"; then
            ln -sfn "rows/$rows" "$LONG/$ITEMS"
            return 0
        fi
    done
    echo "No number of rows in '$ROWS' brings the student to $MINIMUM: give more by ROWS, or more steps by WARM_UP."
    return 1
}

diagnose() {  # FOLDER LENGTHS SCORER DIAGNOSIS: prints the share of failed answers that the teacher mends behind their first error
    [ -e "$4/diagnosis.json" ] || python -m gkd diagnose "$1/student" "$1/teacher" "$1/data/held_out.jsonl" --output_dir "$4" \
        --scorer "$3" --max_rows 350 --eval_temperature 1 --dtype bfloat16 --teacher_dtype bfloat16 $2 >&2
    choose rescue "$4"
}

gate() {
    local rate
    models
    student
    rate=$(diagnose "$LONG/$ITEMS" "$(lengths "$ITEMS")" "$SCORER" "$LONG/diagnosis")
    echo "The teacher mends $rate of the student's failed answers behind their first error."
    at_least "$rate" 0.3 || { echo "That is less than 0.3: on-policy training would hardly pay, so nothing follows."; exit 1; }
}

main() {
    SEEDS=1 claim "$LONG/$ITEMS" "$ITEMS" supervised_forward mixed_forward mixed_jsd mixed_reverse
    local best
    best=$(choose best "$LONG/$ITEMS/results")
    echo "With half of the steps on-policy the $best divergence does best, by seed 1."
    claim "$LONG/$ITEMS" "$ITEMS" supervised_forward "mixed_$best" "auto_$best"
}

equal() {
    SEEDS=1 JOBS=1 claim "$LONG/$ITEMS" "$ITEMS" supervised_timed on_policy_timed stock_timed
    EQUAL_STEPS=$(choose steps "$LONG/$ITEMS/results" "mixed_$(choose best "$LONG/$ITEMS/results")")
    export EQUAL_STEPS
    claim "$LONG/$ITEMS" "$ITEMS" supervised_forward_longer
}

others() {
    claim "$LONG/$ITEMS" "$ITEMS" supervised_perturbed supervised_jsd supervised_reverse seq_kd on_policy_forward on_policy_jsd \
        on_policy_reverse on_policy_guarded
}

horizons() {
    local items best rows
    best=$(choose best "$LONG/$ITEMS/results")
    rows=$(wc -l <"$LONG/$ITEMS/data/train.jsonl")
    for items in $((ITEMS / 2)) $((ITEMS * 2)); do
        folder "$LONG/$items" "$items" "$rows"
        SEEDS=${SEEDS:-2} claim "$LONG/$items" "$items" supervised_forward "mixed_$best"
    done
}

few() {  # the student's first training has seen the answers of train.jsonl, here a twentieth of all
    local data=$LONG/few/data
    if [ ! -e "$data" ]; then
        rm -rf "$data.partial"
        mkdir -p "$LONG/few"
        cp -r "$LONG/$ITEMS/data" "$data.partial"
        mv "$data.partial/train.jsonl" "$data.partial/answered.jsonl"
        awk 'NR % 20 == 1' "$data.partial/answered.jsonl" >"$data.partial/train.jsonl"
        mv "$data.partial" "$data"
    fi
    folder "$LONG/few" "$ITEMS" 0
    BEST_BETA=$(choose beta "$LONG/$ITEMS/results")
    export BEST_BETA
    claim "$LONG/few" "$ITEMS" few_mixed few_supervised few_seq_kd
}

seven() {
    OUT=$LONG/seven SCORER= LENGTHS= SAVE_STEPS= CELLS=experiments/claim/cells.txt WARM_UP=1000 ROWS=1000 experiments/claim.sh start
    echo "On the seven tasks of claim.sh it mends $(diagnose "$LONG/seven" "--max_length 256 --max_new_tokens 104" \
        experiments.claim.tasks:solved "$LONG/seven/diagnosis")."
}

for stage in ${@:-gate main equal others horizons few seven}; do
    case $stage in
        gate | main | equal | others | horizons | few | seven) "$stage" ;;
        *) echo "There is no stage $stage: gate, main, equal, others, horizons, few or seven."; exit 1 ;;
    esac
done
