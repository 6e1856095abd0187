#!/usr/bin/env bash
# From a fresh clone to a distilled student of half the teacher's depth on one CUDA GPU: teacher SmolLM2-135M-Instruct, student
# the 15 of its 30 layers that count most, prompts from data/ and 12,000 that the teacher writes.
#   OUT    where models, runs and report go (default: quickstart_gpu)
#   TORCH  the torch to install, see experiments/setup.sh; the default runs on recent NVIDIA drivers
set -euo pipefail
cd "$(dirname "$0")/.."
experiments/setup.sh
exec .venv/bin/python experiments/quickstart.py --gpu "${OUT:-quickstart_gpu}"
