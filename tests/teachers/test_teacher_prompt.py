"""A teacher that reads more than its student: `teacher_prompt` in place of the prompt, before the same completion."""

import json

import pytest
import torch
from commands import command
from datasets import Dataset
from tiny import ROWS, make_model, make_tokenizer
from trainers import losses, make_trainer, tiny_trainer

import cache_teacher
from gkd.data.batch import IGNORE, Batch, GKDCollator, Source, read_after, unpadded_rows
from gkd.data.encoding import RowEncoder, encode_dataset, rows_fingerprint
from gkd.data.rows import DataError, row_problem
from gkd.losses.targets import HiddenTarget
from gkd.models.heads import LogitHead, last_hidden_states
from gkd.teachers.cache import TeacherCache
from gkd.teachers.placed import LocalTeacher

HINTS = ("Add them.", None, "Greet back, and be very polite about it.", "Say well.")
PROMPTED = [
    row
    | {
        "teacher_prompt": hint
        and [{"role": "system", "content": hint}, {"role": "user", "content": row["messages"][0]["content"]}]
    }
    for row, hint in zip(ROWS, HINTS, strict=True)
]
STOPS = [1, 2]


def encoder(**options):
    settings = {"max_length": 80, "max_new_tokens": 6, "train_on": "last_turn", "stop_ids": STOPS} | options
    return RowEncoder(make_tokenizer(), **settings)


def test_a_row_has_both_prompts():
    tokenizer = make_tokenizer()
    for row, hint in zip(PROMPTED, HINTS, strict=True):
        encoded, plain = encoder()(row), encoder()({"messages": row["messages"]})
        assert {name: encoded[name] for name in plain} == plain
        question = row["messages"][0]["content"]
        text = f"<|user|>{question}<|end|>\n<|assistant|>"
        if hint is not None:
            text = f"<|system|>{hint}<|end|>\n{text}"
        assert tokenizer.decode(encoded["teacher_prompt_ids"]) == text
    text = encoder()({"prompt": "2 + 2 =", "teacher_prompt": "1 + 1 = 2, 2 + 2 ="})
    assert tokenizer.decode(text["teacher_prompt_ids"]) == "1 + 1 = 2, 2 + 2 ="
    long = encoder(max_length=40)(PROMPTED[2])  # the student's limit is not the teacher's
    assert len(long["teacher_prompt_ids"]) > 40


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        (PROMPTED[2], {"teacher_window": 60}, "`teacher_prompt` has"),
        (PROMPTED[2], {"train_on": "all_turns"}, "--train_on last_turn"),
        (PROMPTED[1], {"train_on": "all_turns"}, "--train_on last_turn"),  # null
        (ROWS[0] | {"teacher_prompt": ""}, {}, "must ask something"),
        (ROWS[0] | {"teacher_prompt": ROWS[0]["messages"]}, {}, "must ask something"),
        (ROWS[0] | {"teacher_prompt": []}, {}, "non-empty list"),
        (ROWS[0] | {"teacher_prompt": 3}, {}, "must be text or a list of messages"),
    ],
)
def test_bad_ones_are_refused(row, options, said):
    with pytest.raises(DataError, match=f"row 7: .*{said}"):
        encoder(**options)(row, 7)
    assert bool(row_problem(row)) != bool(options)


def test_rows_with_other_teacher_prompts_are_other_rows():
    with_hints, others = ([*PROMPTED], [*PROMPTED])
    others[0] = others[0] | {"teacher_prompt": PROMPTED[3]["teacher_prompt"]}
    rows = [encode_dataset(Dataset.from_list(part), encoder()) for part in (with_hints, others, ROWS)]
    assert len({rows_fingerprint(part) for part in rows}) == 3


def test_the_same_completions_stand_behind_other_prompts():
    prompts, ends = [[5, 6, 7], [8], [9, 9, 9, 9]], [[20, 21], [22, 23, 24, 25], [26]]
    theirs = [[30], [31, 32, 33], [34, 35]]
    rows = [
        {"prompt_ids": p, "input_ids": p + e, "labels": [IGNORE] * len(p) + e, "answer_cut": False}
        | {"teacher_prompt_ids": t}
        for p, e, t in zip(prompts, ends, theirs, strict=True)
    ]
    collated = GKDCollator(0)(rows)
    batch = Batch.of(collated)
    read_after(batch, collated["teacher_prompts"], collated["teacher_prompt_attention_mask"])
    ids, mask, scored = batch.teacher_inputs
    assert unpadded_rows(ids, mask) == [t + e for t, e in zip(theirs, ends, strict=True)]
    next_tokens = ids.flatten()[scored + 1]
    assert next_tokens.tolist() == batch.input_ids.flatten()[batch.scored + 1].tolist() == [20, 21, 22, 23, 24, 25, 26]


def test_rows_of_a_stream_may_lack_the_column():
    encoded = [encoder()(row) for row in (ROWS[0], PROMPTED[2])]
    for rows in (encoded, encoded[::-1]):
        collated = GKDCollator(0)(rows)
        read = unpadded_rows(collated["teacher_prompts"], collated["teacher_prompt_attention_mask"])
        assert read == [row.get("teacher_prompt_ids", row["prompt_ids"]) for row in rows]


def watched(monkeypatch):
    """The batches that teachers are asked about from now on, and the prompts that they answer."""
    batches, prompts, target, write = [], [], LocalTeacher.target, LocalTeacher.write

    def watch(self, batch):
        batches.append(batch)
        return target(self, batch)

    def watch_writing(self, ids, mask, config, seed):
        prompts.extend(unpadded_rows(ids, mask))
        return write(self, ids, mask, config, seed)

    monkeypatch.setattr(LocalTeacher, "target", watch)
    monkeypatch.setattr(LocalTeacher, "write", watch_writing)
    return batches, prompts


@pytest.mark.parametrize("flags", [{}, {"lmbda": 1.0}, {"seq_kd": True}], ids=["dataset", "on_policy", "teacher"])
def test_the_loss_is_that_of_the_prompted_teacher(tmp_path, monkeypatch, flags):
    batches, written = watched(monkeypatch)
    options = {"per_device_train_batch_size": 4, "max_length": 120}
    trainer = tiny_trainer(tmp_path, make_model(0), make_model(1), PROMPTED, **options, **flags)
    trainer.train()
    encode = trainer.pairing.encoder
    theirs = {tuple(row["prompt_ids"]): row["teacher_prompt_ids"] for row in map(encode, PROMPTED)}
    if "seq_kd" in flags:
        assert sorted(written) == sorted(theirs.values())
    student, teacher = trainer.model, trainer.teacher
    hidden, read, labels = [], [], []
    for batch in batches:
        for ids, targets in zip(batch.input_ids, batch.labels, strict=True):
            at = (targets[1:] != IGNORE).nonzero()[:, 0]
            start, end = int(at[0]) + 1, int(at[-1]) + 2
            prompt, answer = ids[:start].tolist(), ids[start:end].tolist()
            whole = torch.tensor([theirs[tuple(prompt)] + answer])
            hidden.append(last_hidden_states(student, ids[None, :end], None)[0, at])
            read.append(last_hidden_states(teacher.inner, whole, None)[0, -len(answer) - 1 : -1])
            labels.append(ids[at + 1])
    hidden, read, labels = map(torch.cat, (hidden, read, labels))
    heads = LogitHead.of(student), LogitHead.of(teacher.inner)
    expected, _ = trainer.objective.loss(hidden, HiddenTarget(read, heads[1]), labels, heads[0])
    assert losses(trainer)[0] == pytest.approx(expected.item() / len(labels), abs=1e-4)
    # Without their own prompts the teacher says something else.
    plain = tiny_trainer(tmp_path, make_model(0), make_model(1), ROWS, **options)
    plain.train()
    if not flags:
        assert abs(losses(plain)[0] - losses(trainer)[0]) > 1e-3


def test_a_teacher_prompt_that_is_the_prompt_changes_nothing(tmp_path):
    flags = {"lmbda": 0.5, "seq_kd": True, "beta": 0.3}
    same = [row | {"teacher_prompt": row["messages"][:1]} for row in ROWS]
    histories = []
    for rows in (ROWS, same):
        trainer = make_trainer(tmp_path / str(len(histories)), rows=rows, **flags)
        trainer.train()
        histories.append(losses(trainer))
    assert len(histories[0]) == 3
    assert histories[0] == histories[1]


def test_an_evaluation_compares_with_the_prompted_teacher(tmp_path, monkeypatch):
    batches, written = watched(monkeypatch)
    questions = [
        {"prompt": row["messages"][:1], "teacher_prompt": row["teacher_prompt"]} for row in PROMPTED
    ]  # without an answer: the teacher's is the text that is given
    trainer = tiny_trainer(tmp_path, make_model(0), make_model(1), ROWS, questions)
    trainer.evaluate()
    theirs = [trainer.pairing.encoder(row)["teacher_prompt_ids"] for row in questions]
    assert sorted(written) == sorted(theirs)
    read = [row[: len(t)] for batch in batches for row in unpadded_rows(*batch.teacher_inputs[:2]) for t in theirs]
    assert sum(row in theirs for row in read) >= 2 * len(theirs)  # given text and the student's own


def test_a_cache_holds_what_the_prompted_teacher_says(tmp_path, saved):
    (tmp_path / "rows.json").write_text(json.dumps(PROMPTED))
    words = command(saved, tmp_path / "rows.json", tmp_path / "cache")
    cache_teacher.main(
        [word for word in words if word in words[: words.index("--output_dir") + 2]] + ["--top_k", "264"]
    )
    rows = TeacherCache(tmp_path / "cache").rows()
    teacher = make_model(1, hidden_size=48)
    for row, raw in zip(rows, PROMPTED, strict=True):
        answer = row["input_ids"][len(row["prompt_ids"]) :]
        ids = torch.tensor([encoder(max_length=None)(raw)["teacher_prompt_ids"] + answer])
        log_probs = teacher(ids).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        top = torch.tensor(row["topk_log_probs"], dtype=torch.float32).view(len(answer), -1)
        torch.testing.assert_close(top, log_probs.sort(descending=True).values, rtol=2**-10, atol=1e-4)


def test_text_written_ahead_comes_back_with_what_the_teacher_reads(tmp_path):
    flags = {"lmbda": 1.0, "steps_per_generation": 3, "per_device_train_batch_size": 2, "max_steps": 3}
    rows = PROMPTED * 2
    whole = make_trainer(tmp_path / "whole", rows=rows, **flags)
    whole.train()
    first = make_trainer(tmp_path / "cut", rows=rows, **flags)
    first.train()
    resumed = make_trainer(tmp_path / "cut", rows=rows, **flags)
    assert resumed.rollout.draw(1) is Source.ON_POLICY
    resumed.train(str(tmp_path / "cut/run/checkpoint-1"))
    assert losses(resumed)[-2:] == losses(whole)[-2:]
