#!/usr/bin/env bash
# From a fresh clone to a distilled student on a machine with two CPU cores and no GPU, in 7 minutes after the
# downloads: teacher SmolLM2-135M-Instruct, student with narrower MLPs and 90 % of its parameters, prompts from data/.
#   OUT  where models, runs and report go (default: quickstart)
set -euo pipefail
cd "$(dirname "$0")/.."
experiments/setup.sh
exec .venv/bin/python experiments/quickstart.py "${OUT:-quickstart}"
