"""Who is no model in this process is a teacher too: training, writing and evaluation ask it through the door alone."""

import json
from contextlib import nullcontext
from functools import partial

import torch
from accelerate import Accelerator
from commands import ANSWERS
from datasets import Dataset
from tiny import ROWS, make_model
from trainers import tiny_trainer

import cache_teacher
import eval_gkd
import train_gkd
from gkd.config.teacher import TEACHERS
from gkd.data.batch import scored_positions
from gkd.generation.generator import CompletionGenerator, complete
from gkd.generation.sampling import writer_fingerprint
from gkd.losses.targets import HiddenTarget
from gkd.models.heads import LogitHead, hidden_at_scored, last_hidden_states
from gkd.models.loading import size_of
from gkd.models.pairing import Side
from gkd.runs.results import read_results
from gkd.teachers.base import Teacher
from gkd.teachers.cache import TeacherCache


class Asked(Teacher):
    """Answers as a server would: hidden states for ids and a head beside the student, text for prompts."""

    writes = True

    def __init__(self, server):
        self.server, self.head, self.batches = server.eval(), LogitHead.of(server), 0
        self.size, self.texts = size_of(server), 0

    def side(self, student, args):
        return Side(student.tokenizer, self.server.config.vocab_size, ())

    @torch.no_grad()
    def target(self, batch):
        self.batches += 1
        hidden = hidden_at_scored(partial(last_hidden_states, self.server), *batch.teacher_inputs)
        return nullcontext(HiddenTarget(hidden, self.head))

    def write(self, prompts, mask, config, seed):
        self.texts += len(prompts)
        return complete(self.server, Accelerator(), CompletionGenerator(), prompts, mask, config, seed)

    def identity(self, config):
        return writer_fingerprint(self.server, config)


class Prefixed(Asked):
    """Reads three tokens before each prompt, which a column of the row chooses: more context than the student has."""

    keeps_rows = True

    def columns(self, rows):
        return {"prefix": torch.tensor([[3 + len(json.loads(row["row"])["messages"])] * 3 for row in rows])}

    def read(self, batch, collated):
        mask = batch.attention_mask
        mask = torch.ones_like(batch.input_ids) if mask is None else mask
        prefix = collated["prefix"].to(batch.input_ids)
        batch.teacher_input_ids = torch.cat([prefix, batch.input_ids], 1)
        batch.teacher_attention_mask = torch.cat([torch.ones_like(prefix), mask], 1)
        batch.teacher_scored = scored_positions(torch.cat([torch.full_like(prefix, -100), batch.labels], 1))


def by_flag(args):
    return Asked(make_model(1, hidden_size=48))


def trained(teacher, folder, **options):
    mix = {"per_device_train_batch_size": 1, "max_steps": 4, "learning_rate": 1e-2, "lmbda": 0.5}
    trainer = tiny_trainer(folder, make_model(0), teacher, gradient_checkpointing=True, **(mix | options))
    trainer.train()
    return trainer


def test_a_teacher_elsewhere_trains_the_same_student(tmp_path):
    """On its own text, the dataset's and the teacher's, which is kept; and it is evaluated against the same teacher."""
    asked, options = Asked(make_model(1)), {"seq_kd": True, "held_out": Dataset.from_list(ROWS[:3])}
    here = trained(make_model(1), tmp_path / "here", **options)
    there = trained(asked, tmp_path / "there", **options)
    assert there.teacher is asked
    assert asked.batches == 4
    assert asked.texts > 0
    logs = [
        [{k: v for k, v in log.items() if k == "loss" or k.endswith("_length")} for log in trainer.state.log_history]
        for trainer in (here, there)
    ]
    assert logs[0] == logs[1]
    for one, other in zip(here.model.parameters(), there.model.parameters(), strict=True):
        assert torch.equal(one, other)
    texts = [trainer.rollout.cache for trainer in (here, there)]
    assert texts[0].fingerprint == texts[1].fingerprint
    assert texts[0].written(texts[0].run) == texts[1].written(texts[1].run)
    assert texts[1].written(texts[1].run)["entries"] > 0
    assert here.evaluate().keys() == there.evaluate().keys()
    results = [read_results(tmp_path / name) for name in ("here", "there")]
    for one, other in zip(*results, strict=True):
        for name in ("model", "metrics", "parameters", "gib", "records"):
            assert one[name] == other[name], name


def test_each_command_takes_what_its_flag_makes(saved, tmp_path, monkeypatch):
    """`train`, `evaluate` and `cache` say with it what they say with the same teacher as a model."""
    places = [tmp_path / "model", tmp_path / "asked"]
    for place in places:
        common = ["--dataset_name", str(ANSWERS), "--max_new_tokens", "6", "--max_length", "80"]
        names = [
            "--model_name_or_path",
            str(saved / "student"),
            "--teacher_model_name_or_path",
            str(saved / "teacher"),
        ]
        run, cache = str(place / "run"), str(place / "cache")
        more = "--lmbda 0.5 --seq_kd True --max_steps 2 --use_cpu True --bf16 False --report_to none --preflight off"
        train_gkd.main([*names, *common, "--output_dir", run, "--eval_dataset_name", str(ANSWERS), *more.split()])
        eval_gkd.main([run, "--output_dir", str(place / "evaluated")])
        cache_teacher.main([*names, *common, "--output_dir", cache, "--seq_kd", "True", "--top_k", "4"])
        monkeypatch.setitem(TEACHERS, "teacher_model_name_or_path", f"{__name__}:by_flag")
    for name in ("run", "evaluated"):
        for one, other in zip(*(read_results(place / name) for place in places), strict=True):
            assert {k: one[k] for k in ("model", "metrics", "settings", "records")} == {
                k: other[k] for k in ("model", "metrics", "settings", "records")
            }
    rows = [TeacherCache(place / "cache").rows().with_format(None).to_list() for place in places]
    assert rows[0] == rows[1]


def test_what_a_teacher_reads_is_filled_in_at_one_place(tmp_path):
    """A teacher with more context than the student: training and evaluation have it read a batch made by hand."""
    seen = []

    class Watched(Prefixed):
        def target(self, batch):
            seen.append(batch)
            return super().target(batch)

    teacher, held_out = Watched(make_model(1)), Dataset.from_list(ROWS[:2])
    trainer = trained(teacher, tmp_path, lmbda=0.4, max_steps=6, held_out=held_out)
    assert {trainer.rollout.draw(step).label for step in range(6)} == {"dataset", "on_policy"}
    trained_on = len(seen)
    trainer.evaluate()
    assert len(seen) > trained_on
    student, head = trainer.model, LogitHead.of(trainer.model)
    for batch in list(seen):
        hidden, theirs, labels = [], [], []
        lengths = batch.teacher_lengths  # of training; an evaluation's batches have a mask
        lengths = batch.teacher_attention_mask.sum(1) if lengths is None else lengths
        for ids, length, targets in zip(batch.input_ids, lengths, batch.labels, strict=True):
            row = ids[: int(length) - 3]
            at = (targets[1:] != -100).nonzero()[:, 0]
            hidden.append(last_hidden_states(student, row[None], None)[0, at])
            longer = torch.cat([torch.tensor([5, 5, 5]), row])
            theirs.append(last_hidden_states(teacher.server, longer[None], None)[0, at + 3])
            labels.append(row[at + 1])
        hidden, theirs, labels = map(torch.cat, (hidden, theirs, labels))
        expected, _ = trainer.objective.loss(hidden, HiddenTarget(theirs, teacher.head), labels, head)
        found, *_ = trainer.comparison.loss(batch, 1.0)
        torch.testing.assert_close(found, expected)
        without, _ = trainer.objective.loss(hidden, HiddenTarget(theirs.roll(1, 0), teacher.head), labels, head)
        assert len(labels) == 1 or abs(found - without) > 1e-4
