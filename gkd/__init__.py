"""gkd: distil a large language model into a small one with Generalized Knowledge Distillation (arXiv 2306.13649)."""

import os
import sys

__version__ = "0.1.0"

# `python -m gkd.chat` puts the current folder before all others. In a run's folder, which somebody may have sent, a
# `torch.py` would be imported in place of torch.
if sys.path[:1] == [os.getcwd()] and os.path.lexists("run.json"):
    del sys.path[0]

# TRL warns on each import of its experimental GKD trainer; gkd pins TRL's minor version instead (gkd.trl_compat).
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
