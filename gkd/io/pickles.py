"""Pickles in checkpoints and weights are read as data: a file that would run code when loaded is refused by name.

torch and transformers load with `weights_only` already; DeepSpeed and FSDP's sharded checkpoints do not. And all of
them refuse a file by a traceback in the middle of loading.
"""

import os
import pickle
import zipfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import torch
from transformers.trainer_pt_utils import safe_globals

from gkd.io.errors import first_line

# What a DeepSpeed checkpoint holds besides tensors and plain values.
_DEEPSPEED = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
# What the `.metadata` of a sharded checkpoint holds besides dtypes, by module.
_SHARDED = {
    "torch.distributed.checkpoint.metadata": """Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata
        ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING StorageMeta""".split(),
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
    "torch.serialization": ["_get_layout"],
    "torch": ["Size"],
    "pathlib": ["PosixPath"],
    "collections": ["OrderedDict"],
}
_ENDINGS = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_NEVER_READ = ("training_args.bin",)  # transformers writes it, for people to look at


class _ShardedMetadata(pickle.Unpickler):
    """Unpickles what torch.distributed.checkpoint writes, and refuses anything else."""

    def find_class(self, module: str, name: str):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _SHARDED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def check_checkpoint(folder: str | Path) -> None:
    """Reads a checkpoint's pickles as data. Before loading the checkpoint, call `load_as_data` instead.

    Raises:
        ValueError: naming a file that would run code, or that is no torch file at all.
    """
    folder = Path(folder)
    inside = sorted(folder.rglob("*"))
    for path in inside:
        if path.is_symlink() and path.is_dir():  # rglob does not look into it
            raise ValueError(
                f"{path} is refused: it is a link to a folder, whose files can't be vouched for. Copy them here."
            )
    with torch.serialization.safe_globals(_deepspeed_classes(folder)):
        for path in inside:
            is_pickle = path.suffix in _ENDINGS or path.name == ".metadata"
            if is_pickle and path.name not in _NEVER_READ and path.is_file():
                _check(path)


def load_as_data(folder: str | Path) -> None:
    """Checks a checkpoint, then lets torch.load read only data in this process, whatever its callers ask for.

    Data is tensors, plain values and the classes in DeepSpeed's checkpoints, since DeepSpeed asks for full pickles.
    Sets an environment variable of torch, for the rest of the process. Raises as `check_checkpoint`.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    check_checkpoint(folder)  # allows the classes below only while it reads
    torch.serialization.add_safe_globals(_deepspeed_classes(Path(folder)))


def check_weights(name: str) -> None:
    """Reads the pickled weights of a local model or adapter as data; safetensors, which are preferred, hold no code.
    Raises ValueError, naming a file that would run code on loading."""
    folder = Path(name)
    for safe, pickled in (("model", "pytorch_model"), ("adapter_model", "adapter_model")):
        if not any(folder.glob(f"{safe}*.safetensors")):
            for path in sorted(folder.glob(f"{pickled}*.bin")):
                _check(path)


def _deepspeed_classes(folder: Path) -> list[type]:
    """The classes that a DeepSpeed checkpoint may hold; none for another checkpoint."""
    classes = []
    for module, name in _DEEPSPEED if any(folder.glob("global_step*")) else ():
        with suppress(ImportError, AttributeError):  # another version of DeepSpeed, or none, which can't resume either
            classes.append(getattr(import_module(module), name))
    return classes


def _check(path: Path) -> None:
    try:
        if path.name == ".metadata":
            with path.open("rb") as file:
                _ShardedMetadata(file).load()
            return
        with safe_globals():  # NumPy's random state, as transformers allows it
            if zipfile.is_zipfile(path):
                if names := torch.serialization.get_unsafe_globals_in_checkpoint(path):
                    raise pickle.UnpicklingError(f"it names {', '.join(sorted(names)[:3])}")
            else:  # the form before torch 1.6
                torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises what it likes
        why = first_line(error)[:200] if isinstance(error, pickle.UnpicklingError) else "it is broken"
        if "Weights only load failed" in why:
            why = "it holds more than tensors and plain values"
        raise ValueError(
            f"{path} is refused: {why}. Loading it could run code of whoever made it; take another checkpoint, or "
            "weights as safetensors."
        ) from None
