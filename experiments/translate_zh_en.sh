#!/usr/bin/env bash
# Chinese to English, end to end: pairs become rows, a teacher is tuned on them, distilled, evaluated by BLEU and chrF, exported.
# The same command goes on where it was stopped: a stage whose result lies in OUT is skipped. Other settings, another OUT.
# Prerequisites: pip install -e '.[metrics]', GPUs by CUDA_VISIBLE_DEVICES
# The flags of its distillation: experiments/translate_zh_en.yaml; of its tuning: experiments/tune_teacher.yaml
#   STUDENT, TEACHER  other models than there: names or folders of two with one tokenizer
#   TEACHER_TUNED     a teacher that knows the task, a model or the folder of a LoRA adapter on TEACHER: then none is tuned
#   PAIRS             rows with zh and en, in any form that convert_data.py reads; the sample shows that it runs, no more
#   HELD_OUT          share of the pairs that is kept for the evaluation
#   OUT               where all results go: the rows, teacher/, run/ with the report, student/
#   CONFIG            of both trainings; ds_configs/cpu.yaml with --bf16 False, here and in TUNE_FLAGS, without a GPU
#   TUNE_FLAGS        further flags of the tuning, as TRL's SFT has them; those of this script go to train_gkd.py
set -euo pipefail
cd "$(dirname "$0")/.."
TEACHER=${TEACHER:-}
TEACHER_TUNED=${TEACHER_TUNED:-}
PAIRS=${PAIRS:-data/sample_zh_en.jsonl}
HELD_OUT=${HELD_OUT:-0.1}
OUT=${OUT:-runs/translate_zh_en}
CONFIG=${CONFIG:-ds_configs/ddp.yaml}
TUNE_FLAGS=${TUNE_FLAGS:-}
SYSTEM=帮我把下面中文翻译成英文

# The held-out rows leave the folder of the others: TRL would train on every file that lies there.
if [ ! -f "$OUT/held_out.jsonl" ]; then
    mkdir -p "$OUT/rows"
    python convert_data.py "$PAIRS" -o "$OUT/rows/train.jsonl" --overwrite --source-field zh --target-field en \
        --system "$SYSTEM" --prompt-completion --dedupe --split "$HELD_OUT"
    mv "$OUT/rows/train.heldout.jsonl" "$OUT/held_out.jsonl"
fi

# An adapter; TUNE_FLAGS='--use_peft False --dtype float32 --learning_rate 1e-5' tunes all weights.
if [ -z "$TEACHER_TUNED" ]; then
    TEACHER_TUNED=$OUT/teacher
    if [ ! -d "$TEACHER_TUNED" ]; then
        TEACHER=$TEACHER DATA=$OUT/rows OUT=$TEACHER_TUNED.partial CONFIG=$CONFIG experiments/tune_teacher.sh \
            $TUNE_FLAGS
        mv "$TEACHER_TUNED.partial" "$TEACHER_TUNED"
    fi
fi
if [ -f "$TEACHER_TUNED/adapter_config.json" ]; then
    set -- --teacher_adapter "$TEACHER_TUNED" "$@"
else
    TEACHER=$TEACHER_TUNED
fi

# It evaluates the student before and after, and the teacher; its last file is the report.
if [ ! -f "$OUT/run/report.html" ]; then
    accelerate launch --config_file "$CONFIG" train_gkd.py --config experiments/translate_zh_en.yaml \
        ${STUDENT:+--model_name_or_path "$STUDENT"} ${TEACHER:+--teacher_model_name_or_path "$TEACHER"} \
        --dataset_name "$OUT/rows/train.jsonl" --eval_dataset_name "$OUT/held_out.jsonl" --output_dir "$OUT/run" "$@"
    if [ ! -f "$OUT/run/report.html" ]; then # a signal stops it with a checkpoint, which is no error
        echo "The training was stopped; the same command goes on with it."
        exit 0
    fi
fi
grep -E '^\| (\||bleu|chrf)' "$OUT/run/report.md"

if [ ! -d "$OUT/student" ]; then
    python export_model.py "$OUT/run" -o "$OUT/student"
fi
echo "Report, with answers: $OUT/run/report.html. Student: $OUT/student"
echo "Chat with both: gkd chat --student $OUT/student --teacher $TEACHER_TUNED --system $SYSTEM"
