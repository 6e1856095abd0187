"""The total variation distance."""

import torch

from gkd.losses.divergences import Divergence


class TotalVariation(Divergence):
    """½ Σ |teacher - student|, the largest difference of the probabilities of any set of tokens, between 0 and 1.

    Its gradient is taken as 0 at a token with equal probabilities.
    """

    name = "tv"

    def value(self, log_student: torch.Tensor, log_teacher: torch.Tensor) -> torch.Tensor:
        return 0.5 * (log_teacher.exp() - log_student.exp()).abs().sum(-1)
