"""What the server of preloaded.py has loaded before it forks. No thread may have started by then."""

import gc

gc.disable()  # or it looks through all that is imported, again and again

import psutil  # noqa: F401
import quick  # noqa: F401
import tiny  # noqa: F401
import torch
import trainers  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import gkd.cli.train
import gkd.training.trainer  # noqa: F401

torch.set_num_threads(1)
gc.freeze()
gc.enable()
