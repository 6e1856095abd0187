#!/usr/bin/env bash
# Makes .venv in the repository with gkd and what its tests and the quickstart need.
#   TORCH   the torch to install, a CPU or CUDA build of your choice (default: the version gkd is tested with)
#   EXTRAS  extras of pyproject.toml
set -euo pipefail
cd "$(dirname "$0")/.."
TORCH=${TORCH:-torch==2.13.0}
EXTRAS=${EXTRAS:-test,quickstart}
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/python -m pip install -q "$TORCH"
.venv/bin/python -m pip install -q -e ".[$EXTRAS]"
