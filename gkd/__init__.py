"""gkd: distil a large language model into a small one with Generalized Knowledge Distillation (arXiv 2306.13649)."""

import os
import sys
from itertools import pairwise

__version__ = "0.1.0"

# `python -m gkd.chat` puts the current folder before all others. It may be one that somebody has sent, with a `torch.py`
# in it. The parts of gkd are found without it.
if sys.path[:1] == [os.getcwd()] and any(a == "-m" and b.split(".")[0] == "gkd" for a, b in pairwise(sys.orig_argv)):
    del sys.path[0]

# TRL warns on each import of its experimental GKD trainer; gkd.trl_compat does without it where TRL drops it.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
