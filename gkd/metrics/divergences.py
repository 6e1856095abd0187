"""The divergences by name: what `--divergence` chooses from, their titles, and the flags that they depend on.

A new one needs its class (`gkd.losses.divergences.Divergence`), a line in `DIVERGENCES` and, if it has a flag of its own, a
field of `DivergenceArguments`: record, resume, evaluation and help take it from here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple


class DivergenceName(NamedTuple):
    """`title` and `unit` are those of its figure; `made_by` is its class, called with the value of `flag` if it has one."""

    title: str
    made_by: str
    flag: str | None = None
    unit: str = "nats per token"


DIVERGENCES = {
    "jsd": DivergenceName("JSD at the run's β", "gkd.losses.divergences:jsd", "beta"),
    "skew_kl": DivergenceName("skew KL at the run's α", "gkd.losses.skew:SkewKL", "skew_alpha"),
    "skew_reverse_kl": DivergenceName("skew reverse KL at the run's α", "gkd.losses.skew:SkewReverseKL", "skew_alpha"),
    "tv": DivergenceName("total variation", "gkd.losses.total_variation:TotalVariation", unit="share of probability"),
}


@dataclass
class DivergenceArguments:
    """The flags of divergences, except TRL's `--beta`. `within`: bounds that a value must lie between."""

    divergence: str = field(
        default="jsd",
        metadata={
            "help": "How far the student is from the teacher. jsd: the generalized Jensen-Shannon divergence at --beta, with "
            "the forward KL at 0 and the reverse KL at 1; skew_kl and skew_reverse_kl: DistiLLM's, at --skew_alpha; tv: "
            "the total variation.",
            "choices": list(DIVERGENCES),
        },
    )
    skew_alpha: float = field(
        default=0.1,
        metadata={
            "help": "The share of its first argument in the mixture that a skew KL compares it with, in (0, 1).",
            "within": (0, 1),
        },
    )

    def check_divergence(self, given: Iterable[str] = ()) -> None:
        """Raises ValueError for an unknown divergence, a value out of bounds, or a typed flag of another divergence."""
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"--divergence must be one of {', '.join(DIVERGENCES)}, not {self.divergence!r}.")
        for item in fields(DivergenceArguments):
            low, high = item.metadata.get("within", (None, None))
            value = getattr(self, item.name)
            if low is not None and not low < value < high:
                raise ValueError(f"--{item.name} must lie between {low} and {high}, not {value}.")
        others = set(DIVERGENCE_FLAGS) - {"divergence", DIVERGENCES[self.divergence].flag}
        for flag in sorted(others & set(given)):
            owners = " and ".join(name for name, kind in DIVERGENCES.items() if kind.flag == flag)
            raise ValueError(f"--{flag} does not apply to --divergence {self.divergence}: it is of {owners}.")


# All flags that choose a divergence.
DIVERGENCE_FLAGS = ("divergence", *dict.fromkeys(kind.flag for kind in DIVERGENCES.values() if kind.flag is not None))


def divergence_name(kinds: Iterable[Any]) -> DivergenceName | None:
    """The divergence that all `kinds`, as records and results name them, are; None if they differ."""
    names = {str(kind or "jsd").split(" ")[0] for kind in kinds}  # an older gkd had only the JSD, and named none
    return DIVERGENCES.get(names.pop()) if len(names) == 1 else None
