"""How many layers of the student keep their activations for the backward: as many as memory allows."""

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from gkd.generation.static import CACHE_SHARE
from gkd.models.heads import base_of, last_hidden_states

logger = get_logger(__name__)

_TOKENS = 1024  # of the larger of two forwards whose memory is measured
_MARGIN = 0.1  # of a GPU's memory stays free, for the divergence and a layer's backward


class KeptActivations:
    """Checkpointing, which `--gradient_checkpointing` allows, on the layers for which memory is short.

    A layer that is checkpointed computes its activations again in the backward, with the same result: so each
    micro-batch may have another number of them.

    Args:
        shares: how many pools of memory may hold activations at once: PyTorch's, and that of CUDA graphs.
        may_choose: False leaves the layers as they are.
    """

    def __init__(self, student: nn.Module, device: torch.device, may_choose: bool, shares: int = 1):
        self.student, self.device, self.shares = student, device, shares
        self._layers = [m for m in student.modules() if isinstance(m, GradientCheckpointingLayer)]
        self._asked = may_choose and bool(self._layers) and device.type == "cuda"
        self._chooses = False
        self._budget: float | None = None  # bytes
        self._per_token = 0.0  # bytes of a layer

    @property
    def _may_choose(self) -> bool:
        """From when training begins, where transformers switches checkpointing on."""
        self._chooses = self._chooses or (self._asked and all(layer.gradient_checkpointing for layer in self._layers))
        return self._chooses

    def checkpointed(self, tokens: int) -> int:
        """Has the first layers checkpointed, as many as a micro-batch of so many tokens needs, and returns their number."""
        if not self._may_choose:
            return sum(layer.gradient_checkpointing for layer in self._layers)
        if self._budget is None:
            self._measure()
        kept = min(int(self._budget / max(self._per_token * tokens, 1.0)), len(self._layers))
        return self._set(len(self._layers) - kept)

    def give_up(self) -> bool:
        """All layers are checkpointed from here on; whether that is new."""
        news = self._may_choose and self._budget != 0
        if news:
            self._budget = 0.0
            self._set(len(self._layers))
        return news

    def _set(self, checkpointed: int) -> int:
        for i, layer in enumerate(self._layers):
            layer.gradient_checkpointing = i < checkpointed
        return checkpointed

    def _measure(self) -> None:
        self._set(0)
        config = base_of(self.student).config.get_text_config()
        longest = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
        sizes = []
        with torch.random.fork_rng(devices=[self.device]), torch.enable_grad():
            # The first is not counted: with it autocast casts the weights, and libraries take what they need.
            for tokens in (longest // 2, longest // 2, longest):
                ids = torch.arange(tokens, device=self.device)[None] % config.vocab_size
                before = torch.cuda.memory_allocated(self.device)
                states = last_hidden_states(self.student, ids, None)
                sizes.append(torch.cuda.memory_allocated(self.device) - before)
                del states
        self._per_token = max(sizes[2] - sizes[1], 0) / (longest - longest // 2) / len(self._layers)
        gpu = torch.cuda.current_device() if self.device.index is None else self.device.index
        free, total = torch.cuda.mem_get_info(gpu)
        cap = torch.cuda.get_per_process_memory_fraction(gpu) * total
        allocated, reserved = torch.cuda.memory_allocated(gpu), torch.cuda.memory_reserved(gpu)
        free = min(free + reserved, cap) - allocated
        # The optimizer's two moments come with the first step, and gradients: with graphs, in their pool and beside it too.
        copies = 3 if self.shares == 1 else 5
        pending = sum(copies * p.nbytes for p in self.student.parameters() if p.requires_grad)
        self._budget = max(free - pending - (CACHE_SHARE + _MARGIN) * total, 0.0) / self.shares
        tokens = int(self._budget / max(self._per_token * len(self._layers), 1.0))
        logger.info(
            f"Activations are kept for the backward in micro-batches of up to {tokens} tokens, not computed twice."
        )
