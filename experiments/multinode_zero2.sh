#!/usr/bin/env bash
# Several machines, ZeRO-2. Run on each: NODES=2 RANK=0|1 MASTER=host:port experiments/multinode_zero2.sh
# Its flags: experiments/multinode_zero2.yaml
# Prerequisites: pip install -e '.[deepspeed]' on every machine, the repository at one path, OUT on a shared disk
#   STUDENT, TEACHER  other models than there: names or folders of two with one tokenizer
#   DATA              other rows, as in data/README.md
#   OUT               another folder of the run
#   GPUS              on each machine (default: all)
#   DEEPSPEED         its configuration; empty: DDP, on machines without a GPU over gloo
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NODES:?number of machines}" "${RANK:?this machine, from 0}" "${MASTER:?host:port of machine 0}"
GPUS=${GPUS:-$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')}
DEEPSPEED=${DEEPSPEED-ds_configs/zero2.json}

# A machine that dies takes the others with it; start all of them again with --resume_from_checkpoint auto.
exec torchrun --nnodes "$NODES" --node_rank "$RANK" --nproc_per_node "$GPUS" \
    --master_addr "${MASTER%:*}" --master_port "${MASTER##*:}" train_gkd.py --config experiments/multinode_zero2.yaml \
    ${STUDENT:+--model_name_or_path "$STUDENT"} ${TEACHER:+--teacher_model_name_or_path "$TEACHER"} \
    ${DATA:+--dataset_name "$DATA"} ${OUT:+--output_dir "$OUT"} ${DEEPSPEED:+--deepspeed "$DEEPSPEED"} "$@"
