"""A model, an adapter or a teacher's cache known again by what it holds, before it loads."""

import hashlib
import json
from pathlib import Path

from transformers.utils import cached_file

_MOVING = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "base_model_name_or_path")
_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
_BLOCKS, _BLOCK, _LONGEST_HEADER = 64, 1024, 2**26


def fingerprint(name: str, revision: str | None = None) -> str | None:
    """Of a model, adapter or teacher's cache, before it loads: `files ...` of a folder, `commit ...` of a hub's; or None.

    Of weights it reads the names, shapes and sizes, and blocks at even distances: what is trained differs everywhere.
    """
    folder = Path(name)
    if folder.is_dir():
        return f"files {_of_files(folder)}"
    try:
        return f"commit {Path(cached_file(name, 'config.json', revision=revision)).parent.name}"
    except (OSError, ValueError, TypeError):  # whoever loads it says what is wrong
        return None


def _of_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("config.json", "adapter_config.json", "manifest.json"):
        path = folder / name
        if path.is_file():
            content = path.read_bytes()
            try:
                kept = {key: value for key, value in json.loads(content).items() if key not in _MOVING}
                content = json.dumps(kept, sort_keys=True).encode()
            except (ValueError, AttributeError):
                pass
            digest.update(name.encode() + content)
    for path in sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(min(int.from_bytes(file.read(8), "little"), _LONGEST_HEADER)))  # of safetensors
            for start in range(0, size, max(size // _BLOCKS, _BLOCK)):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]
