"""A trained student as a folder that transformers and vLLM load. `gkd.export(run, output_dir)` writes one."""

import sys
from os import PathLike
from pathlib import Path
from types import ModuleType

import torch

from gkd.export.check import Exported
from gkd.export.exporter import write_model
from gkd.export.source import Source, find_model


def export(
    run: str | PathLike,
    output_dir: str | PathLike,
    *,
    checkpoint: str | None = None,
    name: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    teacher_trust_remote_code: bool = False,
) -> Exported:
    """Merges adapters, saves, reads back, compares and describes, as `gkd export` does.

    Args:
        run: folder of a run, a checkpoint, a model or an adapter.
        output_dir: must not exist, or be empty; it appears when all of it went well.
        checkpoint: of the run, `last`, `best` or a step; None: the final model, else the last checkpoint.
        name: how the card calls the model; None: the folder's name.
        dtype: of the exported weights, such as `bfloat16`; `auto`: that of the base model, or of the whole one.
        device: where it is merged and compared; None: `cuda` where there is one.

    Raises:
        ValueError: no model there; `output_dir` holds something; the exported model does not compute what was trained.
    """
    out = Path(output_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already and is not an empty folder.")
    source = Source.open(find_model(str(run), checkpoint), trust_remote_code, teacher_trust_remote_code)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return write_model(source, out, name or out.resolve().name, dtype, device)


class _Package(ModuleType):
    """`from gkd import export` gives this package as soon as one of its modules is imported, so it is the function too."""

    __call__ = staticmethod(export)


sys.modules[__name__].__class__ = _Package
