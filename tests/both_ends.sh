#!/usr/bin/env bash
# Runs the suite with the oldest versions that pyproject.toml allows, the newest, or first one and then the other:
#   tests/both_ends.sh [lowest|newest|both] [ARGUMENTS OF PYTEST]
# Each end has a virtual environment of its own, which is kept.
#   VENVS   the folder of them (default: .venv-ends in the repository root)
#   TORCH   the torch to install, a CPU or CUDA build of your choice (default: the version gkd is tested with)
set -euo pipefail
cd "$(dirname "$0")/.."
ends=${1:-both}
shift || true
case $ends in
both) ends="lowest newest" ;;
lowest | newest) ;;
*) echo "$0: lowest, newest or both, not $ends" >&2; exit 2 ;;
esac
failed=0
for end in $ends; do
    venv=${VENVS:-.venv-ends}/$end
    options=(--upgrade --upgrade-strategy eager)
    [ "$end" = newest ] || options=(--constraint tests/constraints-lowest.txt)
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    "$venv/bin/python" -c 'import torch' 2>/dev/null || "$venv/bin/python" -m pip install -q "${TORCH:-torch==2.13.0}"
    "$venv/bin/python" -c 'import torch; print("torch==" + torch.__version__)' > "$venv/torch.txt" # stays as it is
    "$venv/bin/python" -m pip install -q -e ".[test,quickstart]" --constraint "$venv/torch.txt" "${options[@]}"
    echo "== $end: $("$venv/bin/python" -m pip freeze | grep -E '^(torch|transformers|trl|peft|accelerate|datasets)==' | xargs)"
    # The benchmarks compare gkd with trainers and kernels that TRL has since 1.15.
    [ "$end" = newest ] && rest=() || rest=(--ignore-glob '*test_benchmarks.py')
    "$venv/bin/python" -m pytest -m "" "${rest[@]}" "$@" || failed=1
done
exit $failed
