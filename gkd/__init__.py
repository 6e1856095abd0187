"""gkd: distil a large language model into a small one with Generalized Knowledge Distillation (arXiv 2306.13649)."""

import os

__version__ = "0.1.0"

# TRL warns on each import of its experimental GKD trainer; gkd pins TRL's minor version instead (gkd.trl_compat).
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
