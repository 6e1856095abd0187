"""Who writes the text of an optimizer step: the student, the teacher, or the dataset.

The draws are counter-based: a function of (seed, step) alone, with no generator state. So every rank draws the same,
a resumed run repeats what the interrupted one would have drawn, and nothing else that uses random numbers can shift it.
"""

from enum import IntEnum

import numpy as np


class Source(IntEnum):
    """Also the row of the source in `gkd.metrics.SourceMetrics`."""

    ON_POLICY = 0
    TEACHER = 1
    DATASET = 2

    @property
    def label(self) -> str:
        return self.name.lower()


# Keeps the streams of the different uses of one seed apart.
_SOURCE_STREAM, _SAMPLING_STREAM, _EVAL_STREAM = 1, 2, 3


def draw_source(seed: int, step: int, lmbda: float, seq_kd: bool) -> Source:
    """Algorithm 1 of arXiv 2306.13649, once per optimizer step: on-policy with probability `lmbda`.

    Deviation from the paper (4): the draw is per optimizer step and not per micro-batch, so that all micro-batches of
    a step can be generated at once.
    """
    uniform = np.random.Generator(np.random.Philox(key=[seed, _SOURCE_STREAM], counter=step)).random()  # in [0, 1)
    if uniform < lmbda:
        return Source.ON_POLICY
    return Source.TEACHER if seq_kd else Source.DATASET


def sampling_seed(seed: int, step: int, rank: int, evaluation: bool = False) -> int:
    """The seed of the sampling noise of one generation; differs by step and by rank."""
    stream = _EVAL_STREAM if evaluation else _SAMPLING_STREAM
    return int(np.random.SeedSequence([seed, stream, step, rank]).generate_state(1, np.uint64)[0] >> 1)
