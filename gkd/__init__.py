"""gkd: distil a large language model into a small one with Generalized Knowledge Distillation (arXiv 2306.13649)."""

import os
import pkgutil
import sys
from itertools import pairwise

__version__ = "0.1.0"

# The public names, and where each is defined. Names are imported at their first use: `import gkd` loads neither torch
# nor transformers.
_API = {
    "GKDConfig": "gkd.config.training:GKDArguments",
    "GKDTrainer": "gkd.training.trainer:GKDTrainer",
    "distillation_loss": "gkd.losses.objective:distillation_loss",
    "Divergence": "gkd.losses.divergences:Divergence",
    "Target": "gkd.losses.targets:Target",
    "Teacher": "gkd.teachers.base:Teacher",
    "Generator": "gkd.generation.generator:Generator",
    "Pairing": "gkd.models.pairing:Pairing",
    "load_student": "gkd.models.loading:load_student",
    "load_teacher": "gkd.models.loading:load_teacher",
    "evaluate": "gkd.cli.evaluate:evaluate",
    "export": "gkd.export",  # a callable package: a function of this name would hide it
    "write_report": "gkd.report.write:write_report",
}
__all__ = ["__version__", *_API]

# `python -m gkd` puts the current folder first on the path. That may be a folder that somebody sent, with a `torch.py`
# in it; gkd's own modules are found without it.
if sys.path[:1] == [os.getcwd()] and any(a == "-m" and b.split(".")[0] == "gkd" for a, b in pairwise(sys.orig_argv)):
    del sys.path[0]

# TRL warns on each import of its experimental trainers; gkd.compat has a fallback for when TRL drops this one.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def __getattr__(name: str):
    if name not in _API:
        raise AttributeError(f"module 'gkd' has no attribute {name!r}")
    return pkgutil.resolve_name(_API[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
