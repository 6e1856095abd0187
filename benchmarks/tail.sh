#!/bin/sh
# Seconds a step where answers end anywhere, and of the other shapes beside it, on one GPU: a line a run as it ends, cheapest
# first, each with a limit of its own (RUN@STEPS@SECONDS), the table in runs/tail. Ends within 470 seconds, whatever is left.
# More words go to step_time.py:
#
#     benchmarks/tail.sh --out runs/tail-2 --total 300
cd "$(dirname "$0")/.." || exit 1
exec "${PYTHON:-python3}" benchmarks/step_time.py --out runs/tail --total 470 --runs \
    seed/gkd:on_policy@8@60 \
    long/gkd:off_policy@8@60 \
    qwen/gkd:off_policy@6@70 \
    qwen/gkd:on_policy@6@70 \
    full17/gkd:on_policy@4@90 \
    equal64/gkd:on_policy@4@90 \
    tail64/gkd:on_policy@4@110 \
    tail4k/gkd:on_policy@3@120 \
    tail256/gkd:on_policy@3@160 \
    "$@"
