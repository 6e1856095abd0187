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

MAKERS = (packing.clean, packing.recovery, packing.perturbed, packing.garbled)


def some_rows(make, items=6, kinds=5, count=200):
    return list(itertools.islice(packing.rows_of(make, items, kinds, "test"), count))


def answer(row, lines=None):
    return packing.solved(row.answer if lines is None else "\n".join(lines), packing.as_chat(row))


def signs(lines):
    return {line[0] for line in lines}


@pytest.mark.parametrize("make", MAKERS)
def test_generated_answers_are_right_and_the_same_each_time(make):
    rows = some_rows(make)
    assert [answer(row) for row in rows] == [float(make is not packing.garbled)] * len(rows)
    assert rows == some_rows(make)
    assert len({row.question for row in rows}) == len(rows)
    assert {sum(row.order) for row in rows} == {6}


def test_clean_answers_only_add_and_others_show_how_to_mend():
    for row in some_rows(packing.clean):
        assert len(row.lines) == 7
        assert row.box == [0] * 5
        assert signs(row.lines[:-1]) == {"+"}
    assert all(row.lines[0].startswith("-") for row in some_rows(packing.perturbed))
    for row in some_rows(packing.recovery) + some_rows(packing.garbled):
        assert 0 < row.given < len(row.answer)
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
        begun = row.answer[: row.given].count("\n") + (make is packing.recovery)  # lines whose move is given
        assert away[-1] == 0
        assert all(after == before - 1 for before, after in itertools.pairwise(away[begun:]))
        assert make is not packing.recovery or away[begun] == away[begun - 1] + 1  # the last that is given leads away


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
        assert text["prompt"].split(opening)[1] + text["completion"] == row.answer
        assert text["completion"].startswith(":")  # the box of the last wrong move is
    for row in some_rows(packing.garbled, count=50):
        text = packing.as_text(row, tokenizer)
        right = row._replace(
            lines=text["completion"].split("\n"), box=boxes(row)[text["prompt"].split(opening)[1].count("\n")]
        )
        assert answer(right) == 1.0  # from the box that the last line claims
    (clean,) = some_rows(packing.clean, count=1)
    assert packing.as_text(clean, tokenizer)["prompt"].endswith(opening)
    rows = packing.teacher_rows([3, 6], 5, 80, tokenizer)
    assert sum(row["completion"].startswith(":") for row in rows) == 20


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


def record(cell, accuracy, seed=1, **more):
    found = {"accuracy": accuracy}
    return {"cell": cell, "seed": seed, "jobs": 1, "steps": 300, "seconds_per_step": 0.5, "sampled": found} | more


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in records))


def test_choices(tmp_path):
    cells = [
        {"cell": "start", "seed": 1, "student": {"sampled": {"accuracy": 0.4}}},
        {"cell": "start", "seed": 2, "student": {"sampled": {"accuracy": 0.6}}},
        {"cell": "supervised_timed", "seed": 1, "jobs": 1, "seconds_per_step": 0.5},
        {"cell": "on_policy_timed", "seed": 1, "jobs": 1, "seconds_per_step": 1.6},
        record("mixed_forward", 0.6, flags="--lmbda 0.5 --beta 0"),
        record("mixed_forward", 0.9, seed=2),
        record("mixed_jsd", 0.7, flags="--lmbda 0.5 --beta 0.5"),
        record("mixed_reverse", 0.5),
        record("on_policy_jsd", 0.9, flags="--lmbda 1 --beta 0.5"),
    ]
    write(tmp_path / "cells.jsonl", cells)
    assert choices.start(tmp_path) == pytest.approx(0.5)
    assert choices.best(tmp_path) == "jsd"  # by the seed that all have
    assert choices.beta(tmp_path) == 0.5
    assert choices.steps(tmp_path, "on_policy_jsd") == 960
    assert choices.steps(tmp_path, "mixed_jsd") == 630
    with pytest.raises(SystemExit, match="has no seq_kd"):
        choices.steps(tmp_path, "seq_kd")
    write(tmp_path / "cells.jsonl", [record("supervised_timed", 0.5), record("on_policy_timed", 0.7, jobs=4)])
    with pytest.raises(SystemExit, match="shared a GPU"):
        choices.steps(tmp_path, "on_policy_jsd")


# In place of python and accelerate: writes down what it is asked for and leaves what that would leave.
SHIM = """#!/usr/bin/env bash
echo "$*" >>"$SHIM_LOG"
after() { for i in $(seq $#); do [ "${!i}" != "$flag" ] || { i=$((i + 1)); echo "${!i}"; }; done; }
case "$*" in
    *choices.py* | *sys.exit*) exec "$REAL_PYTHON" "$@" ;;
    *fetch_teacher*) mkdir -p "${@: -1}" ;;
    -\\ *) mkdir -p "$3" ;;
    *packing.py*) mkdir -p "$2/teacher"; seq 100 >"$2/train.jsonl" ;;
    *trl.scripts.sft*) flag=--output_dir; mkdir -p "$(after "$@")" ;;
    *gkd\\ diagnose*) flag=--output_dir; mkdir -p "$(after "$@")"; echo "{\\"rescue\\": {\\"rate\\": $RATE}}" >"$(after "$@")/diagnosis.json" ;;
    train_gkd.py* | *stock_trl.py*) flag=--output_dir; mkdir -p "$(after "$@")/checkpoint-300"; touch "$(after "$@")/trainer_state.json" ;;
    *collect.py*)
        cell=${3%-*}; on=0.5; [[ $cell != on_policy_* ]] || on=1.5; [ "$cell" != mixed_jsd ] || best=0.7
        mkdir -p "$2/results"
        echo "{\\"cell\\": \\"$cell\\", \\"seed\\": ${3##*-}, \\"jobs\\": 1, \\"steps\\": 300, \\"seconds_per_step\\": $on, \\"flags\\": \\"--lmbda 0.5\\"," \\
            "\\"sampled\\": {\\"accuracy\\": ${best:-0.5}}, \\"student\\": {\\"sampled\\": {\\"accuracy\\": 0.${2##*/}}}}" >>"$2/results/cells.jsonl" ;;
esac
"""


@pytest.fixture
def claim_long(tmp_path, monkeypatch):
    """Calls the script with the shim; returns what it prints and what it asked for since the last call."""
    commands = tmp_path / "commands"
    for name in ("python", "accelerate"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(SHIM)
        path.chmod(0o755)
    out = tmp_path / "out"
    for name in ("ITEMS", "MINIMUM", "WARM_UP", "CELLS", "LEARNING_RATE", "JOBS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "OUT": out,
        "SHIM_LOG": commands,
        "REAL_PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "0",
        "SEEDS": 1,
        "ROWS": "125 500",
        "RATE": 0.4,
        "PATH": f"{path.parent}:{os.environ['PATH']}",
    }.items():
        monkeypatch.setenv(name, str(value))

    def call(*stages):
        commands.write_text("")
        done = subprocess.run([REPO / "experiments/claim_long.sh", *stages], capture_output=True, text=True)
        return done, commands.read_text().splitlines()

    call.out = out
    return call


def cells_of(commands):
    """CELL-SEED of the trainings, and their flags."""
    trained = [line.split(" --output_dir ")[1].split(" ", 1) for line in commands if " --output_dir " in line]
    return {Path(folder).name: flags for folder, flags in trained if "/cells/" in folder}


def test_stages_in_their_order_and_nothing_twice(claim_long):
    done, commands = claim_long("gate", "main", "equal")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "With 125 rows SFT brings the student to 0.125." in done.stdout
    assert (claim_long.out / "10").resolve().name == "500"
    assert next(line for line in commands if "packing.py" in line and "--teacher" in line).endswith("--items 5 10 20")
    order = [next(i for i, line in enumerate(commands) if word in line) for word in ("trl.scripts.sft", "rows/125/data", "diagnose", "cells/supervised_forward-1")]  # fmt: skip
    assert order == sorted(order)
    trained = cells_of(commands)
    assert [*trained] == [
        *("supervised_forward-1", "mixed_forward-1", "mixed_jsd-1", "mixed_reverse-1"),
        *("auto_jsd-1", "supervised_timed-1", "on_policy_timed-1", "stock_timed-1", "supervised_forward_longer-1"),
    ]
    assert "--max_new_tokens 488 --max_length 616" in trained["auto_jsd-1"]
    assert trained["auto_jsd-1"].endswith(
        "--learning_rate 3e-4 --save_strategy steps --save_steps 1000 --seed 1 --lmbda auto --beta 0.5 --lmbda_probe_steps 25 "
        f"--max_steps 250 --eval_dataset_name {claim_long.out}/10/data/probe.jsonl --eval_strategy no"
    )
    assert trained["supervised_forward_longer-1"].endswith("--max_steps 600")
    assert all("experiments.claim.packing:solved" in line for line in commands if line.startswith("eval_gkd.py"))

    done, commands = claim_long("gate", "main")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not cells_of(commands)
    assert not [line for line in commands if line.startswith(("train_gkd.py", "-m trl", "eval_gkd.py"))]


def test_nothing_follows_where_the_teacher_cannot_help(claim_long, monkeypatch):
    monkeypatch.setenv("RATE", "0.29")
    done, commands = claim_long()
    assert done.returncode == 1
    assert "The teacher mends 0.29 of the student's failed answers" in done.stdout
    assert not cells_of(commands)
    assert claim_long("mane")[0].stdout.startswith("There is no stage mane")
