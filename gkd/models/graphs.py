"""CUDA graphs of a model's forward, by the shape of its input."""

import time
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from accelerate.logging import get_logger

from gkd.io.errors import first_line

logger = get_logger(__name__)

# The first shapes are captured at once. Where texts end anywhere most come once: others are captured if they come again.
_AT_ONCE, _USES_THAT_PAY, _MOST = 4, 3, 32


def on_device(device: torch.device) -> torch.cuda.device:
    """Makes a GPU the current one for new streams and graphs; has no effect for other devices."""
    return torch.cuda.device(device.index if device.type == "cuda" else -1)


def can_be_graphed(base: torch.nn.Module, device: torch.device) -> bool:
    """Whether a forward on this device launches the same kernels each time, as far as transformers says so."""
    return device.type == "cuda" and getattr(base, "_can_compile_fullgraph", False)


class Graphs:
    """Captures what pays, once for each key; all graphs share their memory, so that only one's result is of use.

    Args:
        what: is captured, for the log.

    Attributes:
        enabled: False from the first capture that fails.
        seconds: spent on capturing.
        pool: of the memory.
    """

    def __init__(self, what: str, enabled: bool):
        self.what, self.enabled = what, enabled
        self.seconds = 0.0
        self.pool = None
        self._captured: dict[Hashable, Any] = {}
        self._uses: Counter[Hashable] = Counter()

    def get(self, key: Hashable, capture: Callable[[], Any], device: torch.device) -> Any | None:
        """What `capture` returned for this key; None if it is not captured, for now or for good."""
        if not self.enabled:
            return None
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
            except RuntimeError as error:
                self.enabled = False
                self.drop()
                logger.warning(f"{self.what} can't be a CUDA graph: {first_line(error)}")
            self.seconds += time.perf_counter() - started
        return self._captured.get(key)

    def drop(self) -> None:
        """Frees their memory."""
        self._captured.clear()
        self._uses.clear()
        self.pool = None
