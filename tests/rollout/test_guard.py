"""`--rollout_guard`: fires where the student's text gets bad, acts for some steps, and watches again."""

import json

import pytest
import torch
from tiny import make_model
from trainers import TWELVE_ROWS, tiny_trainer, weights

from gkd.config.training import GKDArguments
from gkd.data.batch import training_batch
from gkd.report.runs import load_run
from gkd.report.write import write_report
from gkd.rollout.guard import RolloutGuard
from gkd.rollout.steps import Source, StepText
from gkd.runs.record import is_guarded
from gkd.training.callbacks import RunAway

STOP = 2


def text_of(rows, limit=40):
    """The text of a step with these completions, which end unless they have `limit` tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    prompts = torch.full((len(rows), 3), 9)
    batch = training_batch(prompts, torch.ones_like(prompts), ids, mask, pad=0)
    return StepText(Source.ON_POLICY, [batch], len(rows), sum(len(row) == limit for row in rows))


ENDS = [[*range(10, 10 + length), STOP] for length in (11, 15, 19)]  # of 12, 16 and 20 tokens
CUT = [list(range(10, 50))] * 2 + [ENDS[0]]  # two of three have no end
REPEATS = [[7] * 30 + [STOP]] * 2 + [ENDS[0]]


@pytest.fixture
def guard(tmp_path):
    options = {"max_new_tokens": 40, "per_device_train_batch_size": 7, "report_to": "none"}
    args = GKDArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)
    return RolloutGuard(args, [STOP])


def see(guard, rows, steps):
    for step in steps:
        guard.see([text_of(rows)], step)


@pytest.mark.parametrize("rows", [CUT, REPEATS], ids=["cut off", "repeats"])
def test_it_fires_acts_and_is_armed_again(guard, rows):
    see(guard, ENDS, range(20))
    see(guard, rows, range(20, 22))
    assert guard.state()["acts_in"] == [0, 0]  # two steps of five
    see(guard, rows, range(22, 25))
    start, end = guard.state()["acts_in"]
    assert start == 22 + guard.delay  # the third of five
    assert end == start + 20
    assert [guard.limit(step) for step in (start - 1, start, end - 1, end)] == [None, 16, 16, None]
    assert sum(guard.replaces(step) for step in range(start, end)) == 10
    assert not any(guard.replaces(step) for step in (*range(start), end, end + 1))
    see(guard, rows, range(25, end))  # text while it acts says nothing
    assert guard.state()["acts_in"] == [start, end]
    see(guard, rows, range(end, end + 5))
    assert guard.state()["acts_in"][0] == end + 4 + guard.delay  # a window of new text


def test_what_stays_becomes_the_level(guard):
    see(guard, ENDS, range(30))
    see(guard, CUT, range(30, 400))
    state = guard.state()
    assert 80 < state["acts_in"][1] < 200
    assert state["limit"] in (12, 16)


def test_text_that_was_always_so_is_no_alarm(guard):
    see(guard, REPEATS, range(60))
    see(guard, CUT, range(60, 62))  # two of five
    see(guard, REPEATS, range(62, 100))
    assert guard.state()["acts_in"] == [0, 0]


GUARDED = {
    ("off", 0.5, "constant"): False,
    ("on", 1.0, "constant"): True,
    ("auto", 0.0, "constant"): False,
    ("auto", 0.5, "constant"): True,
    ("auto", 1.0, "constant"): False,
    ("auto", 1.0, "linear"): True,
    ("auto", "auto", "constant"): True,
}


@pytest.mark.parametrize("flags", GUARDED)
def test_by_itself_it_acts_unless_all_steps_are_alike(flags):
    assert is_guarded(dict(zip(("rollout_guard", "lmbda", "lmbda_schedule"), flags, strict=True))) == GUARDED[flags]


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_text_that_gets_long_slowly_is_told_beside_it(tmp_path, lmbda):
    trainer = tiny_trainer(tmp_path, make_model(0), make_model(1), TWELVE_ROWS, lmbda=lmbda)
    assert any(isinstance(part, RunAway) for part in trainer.callback_handler.callbacks) == (lmbda > 0)
    assert (trainer.rollout.guard is not None) == (lmbda == 0.5)


def spoilt(tmp_path, name, checkpoint=None):
    """A run whose student repeats itself at steps 16 to 23; its trainer, and of each step the source and most tokens."""
    options = {
        "lmbda": 1.0,
        "rollout_guard": "on",
        "seq_kd": True,
        "max_steps": 46,
        "max_new_tokens": 8,
        "per_device_train_batch_size": 7,
    }
    options |= {"save_strategy": "steps", "save_steps": 30, "learning_rate": 1e-4, "lr_scheduler_type": "constant"}
    models = make_model(0, num_hidden_layers=1), make_model(1, num_hidden_layers=1)
    trainer = tiny_trainer(tmp_path / name, *models, TWELVE_ROWS, **options)
    steps, take, write = {}, trainer.get_batch_samples, trainer.rollout.writer.write_student

    def written(*args):
        ids, mask = write(*args)
        if 16 <= trainer.state.global_step < 24:
            ids, mask = torch.full_like(ids, 70), torch.ones_like(mask)
        return ids, mask

    def taken(*args):
        result = take(*args)
        most = max(int((batch.labels >= 0).sum(1).max()) for batch in trainer.step.batches)
        steps[trainer.state.global_step] = (trainer.step.source.label, most)
        return result

    trainer.rollout.writer.write_student, trainer.get_batch_samples = written, taken
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer, steps


def test_a_run_that_repeats_itself_is_guarded_and_resumed(tmp_path, caplog):
    trainer, steps = spoilt(tmp_path, "whole")
    assert "--rollout_guard: in the student's text up to step " in caplog.text
    logs = {log["step"]: log["rollout_guard"] for log in trainer.state.log_history if "loss" in log}
    acting = [step - 1 for step, acted in logs.items() if acted]
    assert acting == list(range(acting[0], acting[0] + 20))
    assert 20 <= acting[0] <= 28
    for step, (source, most) in steps.items():
        assert source == ("teacher" if step in acting and step % 2 else "on_policy"), step
        assert source == "teacher" or step not in acting or most <= 7, (
            step
        )  # 8 is the limit, half of it or the usual length
    resumed, again = spoilt(tmp_path, "resumed", tmp_path / "whole/checkpoint-30")
    assert again == {step: what for step, what in steps.items() if step >= 30}
    for name, weight in weights(resumed).items():
        assert weight.equal(weights(trainer)[name]), name
    trainer.save_state()
    note = f"the rollout guard acted (logged at steps {acting[0] + 1} to {acting[-1] + 1})"
    assert note in load_run(tmp_path / "whole").notes[0]
    write_report(tmp_path / "whole", tmp_path / "report")
    for page in ("report.md", "report.html"):
        assert "the rollout guard acted" in (tmp_path / "report" / page).read_text()
    assert json.loads((tmp_path / "whole/checkpoint-30/rollout.json").read_text())["guard"]["limit"] < 8
