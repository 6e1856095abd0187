"""CUDA graphs of a model's forward, by the shape of its input."""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn

from gkd.io.errors import first_line

logger = get_logger(__name__)

# The first shapes are captured at once. Where texts end anywhere most come once: others are captured if they come again.
_AT_ONCE, _USES_THAT_PAY, _MOST = 4, 3, 32
# Longer micro-batches keep the GPU busy by themselves, and a graph holds on to the memory of its activations.
MOST_TOKENS = 16384


def on_device(device: torch.device) -> torch.cuda.device:
    """Makes a GPU the current one for new streams and graphs; has no effect for other devices."""
    return torch.cuda.device(device.index if device.type == "cuda" else -1)


@contextmanager
def side_stream() -> Iterator[torch.cuda.Stream]:
    """Work runs on a stream of its own, where a graph may be captured afterwards: before it, libraries initialise there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream().wait_stream(stream)


def can_be_graphed(base: nn.Module, device: torch.device) -> bool:
    """Whether a forward on this device launches the same kernels each time, as far as transformers says so."""
    return device.type == "cuda" and getattr(base, "_can_compile_fullgraph", False)


class Graphs:
    """Captures what pays, once for each key; all graphs share their memory, so that only one's result is of use.

    Args:
        what: is captured, for the log.
        model: whose weights they read.

    Attributes:
        enabled: False from the first capture that fails, but for short memory.
        seconds: spent on capturing.
        pool: of the memory.
        shared: what else the captures share; they set it.
    """

    def __init__(self, what: str, model: nn.Module, enabled: bool):
        self.what, self.model, self.enabled = what, model, enabled
        self.seconds = 0.0
        self.pool = self.shared = None
        self._weights: int | None = None
        self._captured: dict[Hashable, Any] = {}
        self._uses: Counter[Hashable] = Counter()

    def get(self, key: Hashable, capture: Callable[[], Any], device: torch.device) -> Any | None:
        """What `capture` returned for this key; None if it is not captured, for now or for good.

        Raises torch.OutOfMemoryError.
        """
        if not self.enabled:
            return None
        weights = hash(tuple((p.data_ptr(), p.requires_grad) for p in self._params))
        if weights != self._weights:  # graphs read them at fixed addresses, and write the gradients of some
            self.drop()
            self._weights = weights
        self._uses[key] += 1
        room = _MOST if self._uses[key] >= _USES_THAT_PAY else _AT_ONCE
        if key not in self._captured and len(self._captured) < room:
            started = time.perf_counter()
            try:
                # The inner one puts the stream back: a capture that ends with an error does not.
                with on_device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
                    self.pool = self.pool or torch.cuda.graph_pool_handle()
                    self._captured[key] = capture()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # any: without the graph the forward runs, or shows what is wrong
                self.enabled = False
                self.drop()
                logger.warning(f"{self.what} can't be a CUDA graph: {first_line(error)}")
            self.seconds += time.perf_counter() - started
        return self._captured.get(key)

    @cached_property
    def _params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def drop(self) -> None:
        """Frees their memory."""
        self._captured.clear()
        self._uses.clear()
        self.pool = self.shared = None
