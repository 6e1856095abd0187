"""The skew KLs of DistiLLM."""

import math

import torch

from gkd.losses.divergences import Divergence, kl


class SkewKL(Divergence):
    """DistiLLM's KL(teacher || α teacher + (1 - α) student), arXiv 2402.03898.

    The share α of the first in the mixture bounds the log-ratio of each token by log(1 / α). α → 0 gives the KL.
    """

    name = "skew_kl"

    def __init__(self, alpha: float = 0.1):
        self.alpha = alpha
        self.settings = {"skew_alpha": alpha}

    def value(self, log_student: torch.Tensor, log_teacher: torch.Tensor) -> torch.Tensor:
        mixture = torch.logaddexp(log_teacher + math.log(self.alpha), log_student + math.log1p(-self.alpha))
        return kl(log_teacher, mixture)


class SkewReverseKL(SkewKL):
    """KL(student || (1 - α) teacher + α student)."""

    name = "skew_reverse_kl"

    def value(self, log_student: torch.Tensor, log_teacher: torch.Tensor) -> torch.Tensor:
        return super().value(log_teacher, log_student)  # the two change places
