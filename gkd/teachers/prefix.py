"""The beginning that a batch's rows share, read once: a teacher with a long system prompt costs little more than without.

Keys and values of a beginning are kept for later batches, whose rows mostly begin with it too, since a teacher is frozen.
"""

from collections import OrderedDict
from copy import deepcopy

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import Cache, DynamicCache

from gkd.io.errors import first_line
from gkd.models.heads import base_of, last_hidden_states

logger = get_logger(__name__)
# A shared beginning is cut to a multiple of this. So its length, of which rounding depends, follows from the batch, and is
# mostly the same for all batches of a prompt.
_STEP = 64
_KEPT = 2  # beginnings whose keys and values are kept


class SharedPrefix:
    """The teacher's forward from behind the tokens that all rows begin with. Used where it is shown to compute the same."""

    def __init__(self, teacher: nn.Module):
        self.teacher = teacher
        # Keys that depend on how long the whole row is would be those of another length.
        rope = getattr(base_of(teacher).config.get_text_config(), "rope_parameters", None)
        by_length = any(kind in str(rope) for kind in ("dynamic", "longrope"))
        self.works: bool | None = False if by_length else None  # None: not known yet
        self._kept: OrderedDict[tuple[int, ...], Cache] = OrderedDict()  # by the ids of a beginning

    def length(self, ids: torch.Tensor, scored: torch.Tensor) -> int:
        """How many tokens rows (B, L) share before their first scored position, a multiple of 64; 0 if they are not used.

        A single row shares nothing: what it begins with could only be told from rows before it.
        """
        if self.works is False or len(ids) < 2 or not len(scored):
            return 0
        same = (ids == ids[0]).all(0).cumprod(0).sum()
        return int(torch.minimum(same, (scored % ids.shape[1]).min())) // _STEP * _STEP

    @torch.no_grad()
    def states(self, ids: torch.Tensor, mask: torch.Tensor | None, scored: torch.Tensor, length: int) -> torch.Tensor:
        """Hidden states (N, H) at flat positions (N,) of ids (B, L), whose rows share their first `length` tokens."""
        past = deepcopy(self._beginning(ids[:1, :length]))
        past.batch_repeat_interleave(len(ids))
        states = last_hidden_states(self.teacher, ids[:, length:], mask, past)  # (B, L - length, H)
        width = ids.shape[1]
        at = scored // width * (width - length) + scored % width - length
        return states.flatten(0, 1).index_select(0, at)

    def check(self, states: torch.Tensor | Exception, expected: torch.Tensor) -> bool:
        """Whether `states`, or what it raised, are those (N, H) of the whole rows, up to rounding; noted in `works`."""
        why = None
        if isinstance(states, Exception):
            why = first_line(states)
        elif not (apart := ((states - expected).float().norm() / expected.float().norm()).item()) <= 0.05:  # or NaN
            why = f"hidden states differ by {apart:.1%}"
        if why is not None:
            logger.info(f"The teacher reads each row's prompt anew: {why}")
        self.works = why is None
        return self.works

    def _beginning(self, ids: torch.Tensor) -> Cache:
        """Keys and values of ids (1, P)."""
        key = tuple(ids[0].tolist())
        if key not in self._kept:
            past = DynamicCache(config=base_of(self.teacher).config.get_text_config())
            last_hidden_states(self.teacher, ids, None, past)
            self._kept[key] = past
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]
