"""Left-padded prompts, and how to go on from them, for tests of generation."""

import torch
from transformers import GenerationConfig

PROMPTS = torch.tensor([[0, 0, 20, 21], [22, 23, 24, 25], [0, 26, 27, 28]])
MASK = (PROMPTS != 0).long()


def config(**options):
    defaults = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": [1, 2], "top_k": 0}
    return GenerationConfig(**(defaults | options))
