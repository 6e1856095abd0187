"""Who is no model in this process is a teacher too: `side` and `target` are all that training asks of it."""

from contextlib import nullcontext
from functools import partial

import torch
from tiny import make_model
from trainers import tiny_trainer

from gkd.losses.targets import HiddenTarget
from gkd.models.heads import LogitHead, hidden_at_scored, last_hidden_states
from gkd.models.pairing import Side
from gkd.teachers.base import Teacher


class Asked(Teacher):
    """Answers as a server would: hidden states for ids, a head beside the student."""

    def __init__(self, server):
        self.server, self.head, self.batches = server.eval(), LogitHead.of(server), 0

    def side(self, student, args):
        return Side(student.tokenizer, self.server.config.vocab_size, ())

    @torch.no_grad()
    def target(self, batch):
        self.batches += 1
        hidden = hidden_at_scored(partial(last_hidden_states, self.server), *batch.teacher_inputs)
        return nullcontext(HiddenTarget(hidden, self.head))


def trained(teacher, folder, **options):
    mix = {"per_device_train_batch_size": 1, "max_steps": 4, "learning_rate": 1e-2, "lmbda": 0.5}
    trainer = tiny_trainer(folder, make_model(0), teacher, gradient_checkpointing=True, **(mix | options))
    trainer.train()
    return trainer


def test_a_teacher_elsewhere_trains_the_same_student(tmp_path):
    asked = Asked(make_model(1))
    here, there = trained(make_model(1), tmp_path / "here"), trained(asked, tmp_path / "there")
    assert asked.batches == 4
    assert there.teacher is asked
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (here, there)]
    assert losses[0] == losses[1]
    for one, other in zip(here.model.parameters(), there.model.parameters(), strict=True):
        assert torch.equal(one, other)
