"""experiments/claim_long.sh: its task, what it decides by results, and its stages without a training."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import REPO, make_tokenizer

sys.path.insert(0, str(REPO))
from experiments.claim import choices, packing

MAKERS = (packing.clean, packing.recovery, packing.perturbed)


def some_rows(make, items=6, kinds=5, count=200):
    return list(itertools.islice(packing.rows_of(make, items, kinds, "test"), count))


def answer(row, lines=None):
    return packing.solved("\n".join(row.lines if lines is None else lines), packing.as_chat(row))


def signs(lines):
    return {line[0] for line in lines}


@pytest.mark.parametrize("make", MAKERS)
def test_generated_answers_are_right_and_the_same_each_time(make):
    rows = some_rows(make)
    assert [answer(row) for row in rows] == [1.0] * len(rows)
    assert rows == some_rows(make)
    assert len({row.question for row in rows}) == len(rows)
    assert {sum(row.order) for row in rows} == {6}


def test_clean_answers_only_add_and_others_show_how_to_mend():
    for row in some_rows(packing.clean):
        assert len(row.lines) == 7
        assert row.box == [0] * 5
        assert signs(row.lines[:-1]) == {"+"}
    assert all(row.lines[0].startswith("-") for row in some_rows(packing.perturbed))
    for row in some_rows(packing.recovery):
        assert 0 < row.given < len(row.lines)
        assert row.box == [0] * 5


def boxes(row):
    """Counts at the start and behind each line."""
    return [row.box, *([int(c) for c in line.split(": ")[1] if c.isdigit()] for line in row.lines[:-1])]


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_trained_leads_to_the_order(make):
    def distance(box, order):
        return sum(abs(has - wanted) for has, wanted in zip(box, order, strict=True))

    for row in some_rows(make):
        away = [distance(box, row.order) for box in boxes(row)]
        assert away[-1] == 0
        assert all(after == before - 1 for before, after in itertools.pairwise(away[row.given :]))
        assert row.given == 0 or away[row.given] == away[row.given - 1] + 1  # the last that is given leads away


def test_all_right_moves_come_to_be_chosen():
    first = {row.lines[0].split(":")[0] for row in some_rows(packing.clean, items=6, kinds=2, count=50)}
    assert len({line.split()[1] for line in first}) > 10
    assert packing.right_moves([0, 1, 2], [1, 1, 3]) == [(1, 0), (1, 2)]
    assert packing.right_moves([0, 2, 4], [1, 1, 3]) == [(-1, 1), (-1, 2)]  # before anything is added
    assert packing.wrong_moves([0, 1, 9], [1, 1, 9]) == [(1, 1), (-1, 1), (-1, 2)]
    assert packing.right_moves([1, 2], [1, 2]) == []


ROW = packing.Row(["fig", "nut"], [1, 1], [0, 0], [])


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("+ nut: fig0 nut1\n+ fig: fig1 nut1\ndone", 1),
        ("+ fig: fig1 nut0\n+ nut: fig1 nut1\ndone\n", 1),
        ("+ nut: fig0 nut1\n+ nut: fig0 nut2\n- nut: fig0 nut1\n+ fig: fig1 nut1\ndone", 1),  # mended
        ("+ nut: fig0 nut1\n+ nut: fig0 nut2\n+ fig: fig1 nut2\ndone", 0),  # not mended
        ("+ nut: fig0 nut1\ndone", 0),  # too early
        ("+ nut: fig0 nut1\n+ fig: fig1 nut1", 0),  # no end
        ("+ nut: fig1 nut1\ndone", 0),  # the box does not follow
        ("+ nut: fig0 nut2\n- nut: fig0 nut1\n+ fig: fig1 nut1\ndone", 0),  # nor if what comes behind it is right
        ("- nut: fig0 nut0\n+ nut: fig0 nut1\n+ fig: fig1 nut1\ndone", 0),  # nothing to take out
        ("+ tea: fig0 nut1\n+ fig: fig1 nut1\ndone", 0),  # not on the shelf
        ("nut: fig0 nut1\n+ fig: fig1 nut1\ndone", 0),
        ("+ nut: fig0 nut1\n+ fig: fig1 nut1\ndone\n+ fig: fig2 nut1", 0),  # goes on
        ("done", 0),
        ("", 0),
    ],
)
def test_what_counts_as_solved(text, right):
    assert packing.solved(text, packing.as_chat(ROW)) == right


def test_damage_is_not_solved():
    draw = random.Random(0)
    for row in some_rows(packing.recovery, count=50):
        place = draw.randrange(len(row.lines))
        assert answer(row, row.lines[:place] + row.lines[place + 1 :]) == 0.0  # a line is lost
        if place < len(row.lines) - 1:
            kept = row.lines[place]
            count = next(i for i, character in enumerate(kept) if character.isdigit())
            damaged = f"{kept[:count]}{(int(kept[count]) + 1) % 10}{kept[count + 1 :]}"
            assert answer(row, [*row.lines[:place], damaged, *row.lines[place + 1 :]]) == 0.0


def test_the_teacher_is_not_trained_on_what_went_wrong():
    tokenizer = make_tokenizer()
    for row in some_rows(packing.recovery, count=50):
        text = packing.as_text(row, tokenizer)
        opening = "<|assistant|>"
        given, whole = text["prompt"].split(opening)[1], "\n".join(row.lines)
        assert given + text["completion"] == whole
        assert text["completion"].startswith(":")
        assert given.count("\n") == row.given - 1
    (clean,) = some_rows(packing.clean, count=1)
    assert packing.as_text(clean, tokenizer)["prompt"].endswith(opening)
    rows = packing.teacher_rows([3, 6], 5, 80, tokenizer)
    assert sum(row["completion"].startswith(":") for row in rows) == 40


def test_the_students_files():
    files = packing.student_files(4, 12, 20)
    questions = {name: [row.get("prompt", row.get("messages"))[0]["content"] for row in rows] for name, rows in files.items()}  # fmt: skip
    assert questions["prompts"] == questions["train"]
    assert not set(questions["held_out"]) & set(questions["train"] + questions["perturbed"])
    assert questions["perturbed"][:10] == questions["train"][:10]
    assert len(files["perturbed"]) == 20
    assert all(row["messages"][-1]["content"] == "" for row in files["prompts"])
    more = packing.student_files(4, 12, 40)
    assert more["held_out"] == files["held_out"]
    assert more["train"][:20] == files["train"]


def test_an_answer_of_ten_items_has_its_length():
    (row,) = some_rows(packing.clean, items=10, kinds=packing.KINDS, count=1)
    assert len(row.lines) == 11
    assert {len(line.split()) for line in row.lines[:-1]} == {2 + packing.KINDS}


def record(cell, accuracy, seconds=0.5, seed=1, **more):
    found = {"accuracy": accuracy}
    return {"cell": cell, "seed": seed, "jobs": 1, "steps": 300, "seconds_per_step": seconds, "sampled": found} | more


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in records))


def test_choices(tmp_path):
    cells = [
        {"cell": "start", "seed": 1, "student": {"sampled": {"accuracy": 0.4}}},
        {"cell": "start", "seed": 2, "student": {"sampled": {"accuracy": 0.6}}},
        record("supervised_forward", 0.5),
        record("on_policy_forward", 0.6, seconds=1.6),
        record("on_policy_forward", 0.9, seconds=1.8, seed=2),
        record("on_policy_jsd", 0.7, seconds=1.5),
        record("on_policy_reverse", 0.5),
    ]
    write(tmp_path / "cells.jsonl", cells)
    assert choices.start(tmp_path) == pytest.approx(0.5)
    assert choices.best(tmp_path) == "jsd"  # by the seed that all have
    assert choices.steps(tmp_path, "on_policy_jsd") == 900
    assert choices.steps(tmp_path, "on_policy_forward") == 1020
    with pytest.raises(SystemExit, match="has no seq_kd"):
        choices.steps(tmp_path, "seq_kd")
    write(tmp_path / "cells.jsonl", [record("supervised_forward", 0.5), record("on_policy_jsd", 0.7, jobs=4)])
    with pytest.raises(SystemExit, match="shared a GPU"):
        choices.steps(tmp_path, "on_policy_jsd")
