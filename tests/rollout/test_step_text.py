"""Which steps' text is written when: the student's each step or N at a time, the teacher's ahead and once a prompt."""

import pytest
from tiny import make_model
from trainers import losses, tiny_trainer

from gkd.data.batch import Source
from gkd.generation.generator import CompletionGenerator
from gkd.rollout.steps import TextWriter, draw_source
from gkd.training.metrics import Phases
from gkd.training.trainer import GKDTrainer

ROWS = [{"prompt": [{"role": "user", "content": f"{'and ' * (n % 5)}{n}?"}]} for n in range(12)]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains tiny models on ROWS; returns the trainer and what was written: (at which step, source, how many steps)."""

    def make(**options):
        written, generated = [], []
        write, generate = TextWriter.write, CompletionGenerator.__call__

        def watched_write(self, planned, seed, step, limit):
            written.append((step, planned[0].source, len(planned)))
            return write(self, planned, seed, step, limit)

        def watched_generate(self, model, prompts, *args):
            generated.append(len(prompts))
            return generate(self, model, prompts, *args)

        monkeypatch.setattr(TextWriter, "write", watched_write)
        monkeypatch.setattr(CompletionGenerator, "__call__", watched_generate)
        options = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "max_steps": -1,
            "num_train_epochs": 1,
        } | options
        trainer = tiny_trainer(tmp_path / "run", make_model(0), make_model(1), ROWS, **options)
        trainer.written, trainer.generated = written, generated
        trainer.train()
        return trainer

    return make


def test_student_writes_each_step_by_default(train):
    trainer = train(lmbda=1.0)
    assert trainer.written == [(step, Source.ON_POLICY, 1) for step in range(6)]


def test_steps_per_generation_writes_together(train):
    trainer = train(lmbda=1.0, steps_per_generation=4)
    assert trainer.written == [(0, Source.ON_POLICY, 4), (4, Source.ON_POLICY, 2)]  # 6 steps an epoch
    assert trainer.generated == [8, 4]
    assert len(losses(trainer)) == 6


def test_window_ends_with_the_run(train):
    trainer = train(lmbda=1.0, steps_per_generation=4, max_steps=5)
    assert trainer.written == [(0, Source.ON_POLICY, 4), (4, Source.ON_POLICY, 1)]


def test_window_keeps_each_steps_source(train):
    trainer = train(lmbda=0.5, seq_kd=True, steps_per_generation=6, generation_batch_size=2)
    drawn = [draw_source(trainer.args.seed, step, 0.5, True) for step in range(6)]
    logged = [
        next(s for s in Source if f"{s.label}/loss" in log) for log in trainer.state.log_history if "loss" in log
    ]
    assert logged == drawn
    assert set(drawn) == {Source.ON_POLICY, Source.TEACHER}


def test_teacher_writes_ahead_as_much_as_a_generation_holds(train):
    trainer = train(lmbda=0.0, seq_kd=True, generation_batch_size=8)
    assert trainer.written == [(0, Source.TEACHER, 4), (4, Source.TEACHER, 2)]
    assert trainer.generated == [8, 4]


def test_it_writes_as_far_ahead_where_the_students_text_is_guarded(train, tmp_path):
    options = {"lmbda": 0.4, "seq_kd": True, "num_train_epochs": 2}
    guarded, free = (
        list(train(**options, rollout_guard=guard, output_dir=str(tmp_path / guard)).written)
        for guard in ("auto", "off")
    )
    assert guarded == free
    drawn = [draw_source(42, step, 0.4, True) for step in range(6)]  # of the first epoch
    by_teacher = [step for step, source in enumerate(drawn) if source is Source.TEACHER]
    assert by_teacher[-1] >= by_teacher[0] + 4  # which a guard could change, were it on-policy
    assert (by_teacher[0], Source.TEACHER, len(by_teacher)) in guarded


def test_later_epochs_and_runs_read_the_teachers_text(train, tmp_path):
    trainer = train(lmbda=0.0, seq_kd=True, num_train_epochs=3, generation_batch_size=12)
    assert sum(trainer.generated) == 12
    shared = str(tmp_path / "run" / "_teacher_text")
    again = train(lmbda=0.0, seq_kd=True, output_dir=str(tmp_path / "again"), teacher_text_cache=shared)
    assert again.generated == []
    other = train(lmbda=0.0, seq_kd=True, temperature=0.5, output_dir=str(tmp_path / "o"), teacher_text_cache=shared)
    assert sum(other.generated) == 12  # sampled otherwise: not the same text


def test_off_writes_each_steps_text_anew(train):
    trainer = train(lmbda=0.0, seq_kd=True, num_train_epochs=2, teacher_text_cache="off")
    assert trainer.written == [(step, Source.TEACHER, 1) for step in range(12)]
    assert trainer.generated == [2] * 12
    assert trainer.rollout.cache is None


def test_writing_ahead_changes_no_row_and_no_draw(train, monkeypatch):
    """The same prompts at the same steps, whoever writes: only when the text is made differs."""
    seen = []
    loss = GKDTrainer.compute_loss

    def watched(self, model, batch, *args, **kwargs):
        prompt = batch.input_ids[0][batch.labels[0] == -100]
        seen.append((self.state.global_step, self.step.source, prompt[prompt != 0].tolist()))
        return loss(self, model, batch, *args, **kwargs)

    monkeypatch.setattr(GKDTrainer, "compute_loss", watched)
    runs = []
    for options in ({"generation_batch_size": 64}, {"teacher_text_cache": "off"}):
        seen.clear()
        train(lmbda=0.5, seq_kd=True, num_train_epochs=2, **options)
        runs.append(list(seen))
    assert runs[0] == runs[1]


def test_progress_names_who_writes(train, monkeypatch):
    phases = []
    monkeypatch.setattr(Phases, "show", lambda self, doing: phases.append(doing))
    train(lmbda=0.5, seq_kd=True)
    assert {"generating (student)", "generating (teacher)", "training"} <= set(phases)


def test_tokens_seen_can_be_counted(train):
    """transformers' --include_num_input_tokens_seen takes the mask of a batch for one, if there is a mask."""
    trainer = train(lmbda=1.0, include_num_input_tokens_seen="non_padding", max_steps=1)
    assert trainer.state.num_input_tokens_seen > 0
