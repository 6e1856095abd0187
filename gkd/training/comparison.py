"""Student and teacher compared at the scored positions of a batch, in training and in its evaluation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gkd.compat import run_inside_forward
from gkd.data.batch import Batch
from gkd.losses.objective import Objective
from gkd.losses.targets import Target
from gkd.models.heads import LogitHead, hidden_at_scored, hidden_states_and_balance
from gkd.teachers.base import Teacher
from gkd.training.metrics import Phases
from gkd.training.student import StudentForward

# (student's hidden states (N, Hs), teacher's target, next tokens (N,), student's head) -> what the objective computes
Measure = Callable[[torch.Tensor, Target, torch.Tensor, LogitHead], Any]


class Comparison:
    """The objective of a batch. In training, or if the student is sharded, methods run inside its wrapper's forward.

    Args:
        sharded: the student's weights are sharded.
        balance: also return the load-balancing loss of a mixture of experts.
    """

    def __init__(
        self,
        objective: Objective,
        teacher: Teacher,
        phases: Phases,
        student: StudentForward,
        sharded: bool,
        balance: bool,
    ):
        self.objective, self.teacher, self.phases = objective, teacher, phases
        self.student, self.sharded, self.balance = student, sharded, balance

    def loss(self, batch: Batch, kd_ratio: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The summed loss, the summed `TokenStatistics` (6,), and the load-balancing loss or None."""
        balance = None

        def states_and_balance(batch: Batch) -> torch.Tensor:
            return hidden_at_scored(forward, batch.input_ids, batch.attention_mask, batch.scored)

        def forward(*inputs):
            nonlocal balance
            hidden, balance = hidden_states_and_balance(self.student.model, *inputs)
            return hidden

        measure = partial(self.objective.loss, kd_ratio=kd_ratio)
        loss, statistics = self._compare(measure, batch, states_and_balance if self.balance else self.student)
        return loss, statistics.sum(1), balance

    def measure(self, batch: Batch) -> torch.Tensor:
        """The `EvaluationStatistics` (9, N) of the scored positions."""
        return self._compare(self.objective.measure, batch, self.student.padded)

    def _compare(self, measure: Measure, batch: Batch, states: Callable[[Batch], torch.Tensor]) -> Any:
        self.phases.at("the teacher's forward")
        with self.teacher.target(batch) as target:
            self.phases.at("the student's forward and the divergence")
            hidden = states(batch)
            labels = batch.labels.flatten().index_select(0, batch.scored + 1)
            head = LogitHead.of(self.student.model, gathered=self.sharded)

            def compute(hidden: torch.Tensor) -> Any:
                return measure(hidden, target, labels, head)

            if not self.sharded:
                return compute(hidden)
            # Inside the head's forward, ZeRO-3 and FSDP2 gather it once for all chunks of logits, whose number differs
            # between ranks, and once more for the backward.
            return run_inside_forward(head.head, head.head, compute, hidden)
