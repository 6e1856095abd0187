"""Checks that an exported model computes what the student computed before merging."""

from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from gkd.data.encoding import RowEncoder
from gkd.data.loading import load_rows
from gkd.export.source import Source

_ROWS, _TOKENS = 8, 128  # of the run's data, for the comparison
_TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "用一句话解释什么是光合作用：植物利用阳光把水和二氧化碳变成糖。",
    "Q: A train leaves at 9:40 and travels 2 hours and 35 minutes. When does it arrive?\nA: At 12:15.",
)


def sample_tokens(source: Source) -> tuple[list[list[int]], str]:
    """At least 4 sequences to compare logits on, and where they come from: the run's data, or built-in texts."""
    arguments, tokenizer = source.arguments, source.tokenizer
    try:
        folded = arguments.get("system_as_user", False)  # older runs lack this flag
        encoder = RowEncoder(tokenizer, None, 0, "last_turn", [], arguments.get("chat_template_kwargs"), folded)
        place = [arguments[name] for name in ("dataset_name", "dataset_train_split", "dataset_config")]
        rows = load_rows(*place, streaming=True)
        samples = [encoder(dict(row))["input_ids"][-_TOKENS:] for row in islice(rows, _ROWS)]
    except (KeyError, ValueError, OSError):  # no record, or data that has moved: any text will do
        samples = []
    if len(samples) >= 4:
        return samples, arguments["dataset_name"]
    return samples + [tokenizer(text)["input_ids"][:_TOKENS] for text in _TEXTS], "built-in texts"


@torch.no_grad()
def centred_logits(model: nn.Module, samples: list[list[int]]) -> list[torch.Tensor]:
    """Logits less their mean over the vocabulary, which softmax ignores: one (tokens, vocabulary) in fp32 a sample."""
    device = next(model.parameters()).device
    outputs = (model(torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in samples)
    return [logits - logits.mean(-1, keepdim=True) for logits in outputs]


def rms(logits: list[torch.Tensor], other: list[torch.Tensor] | None = None) -> float:
    """Root mean square of centred logits, or of their difference from `other`."""
    differences = logits if other is None else [a - b for a, b in zip(logits, other, strict=True)]
    return torch.cat([difference.flatten() for difference in differences]).double().square().mean().sqrt().item()


@dataclass(frozen=True)
class Check:
    """RMS of differences between centred logits, relative to the RMS of the unmerged model's in fp32."""

    error: float  # the exported model, read back, against the unmerged one
    noise: float  # the unmerged model in the exported dtype against itself in fp32: the effect of rounding alone
    effect: float | None = None  # the base without the adapter against the unmerged model; None for a whole model
    to_base: float | None = None  # the exported model against the base; None for a whole model

    def raise_if_bad(self) -> None:
        """Raises ValueError if the exported model does not compute what was trained."""
        if self.effect is not None and self.effect > self.noise and self.to_base < self.error:
            raise ValueError(f"The exported model is nearer to its base than to the trained student: {self}")
        if not self.error <= 2 * self.noise + 1e-4:  # so that NaN fails
            raise ValueError(f"The exported model does not compute what was trained: {self}")

    def __str__(self) -> str:
        text = f"its logits are {self.error:.2e} off the trained student's; rounding to its dtype alone makes {self.noise:.2e}"
        if self.effect is not None:
            text += (
                f"; the adapter changed them by {self.effect:.2e}, and the export is {self.to_base:.2e} off the base"
            )
        return f"{text} (relative RMS)."


@dataclass(frozen=True)
class Exported:
    """What an export wrote. `gib`: of the weights on disk; `samples`: the texts that `check` ran on."""

    parameters: int
    gib: float
    dtype: str
    check: Check
    samples: str
