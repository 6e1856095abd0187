"""experiments/claim.sh: its task, a run that is killed and goes on, and its tables."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from progress import run as run_command
from progress import wait_until
from tiny import REPO

sys.path.insert(0, str(REPO))
from experiments.claim import collect, tables, tasks

FAST = "--max_steps 2 --bf16 False --per_device_train_batch_size 2 --max_new_tokens 8 --logging_steps 1"


def make_data(folder, train):
    """Three rows of each task and set, `train` for the student."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "SHARES", dict.fromkeys(tasks.SHARES, 3))
        patch.setattr(sys, "argv", ["tasks.py", str(folder), "--train", str(train)])
        tasks.main()
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), 2)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_worked_answers_are_right_and_sets_are_apart(data):
    sets = {name: rows(data / f"{name}.jsonl") for name in ("train", "held_out", "teacher/train", "prompts")}
    questions = {name: {row.get("prompt", row.get("messages"))[0]["content"] for row in rows} for name, rows in sets.items()}  # fmt: skip
    kinds = len(tasks.TASKS)
    assert {name: len(found) for name, found in questions.items()} == {
        "train": 2 * kinds, "held_out": 3 * kinds, "teacher/train": 3 * kinds, "prompts": 2 * kinds,
    }  # fmt: skip
    assert questions["prompts"] == questions["train"]
    assert not questions["train"] & questions["held_out"]
    assert not questions["teacher/train"] & (questions["train"] | questions["held_out"])
    assert all(row["messages"][-1]["content"] == "" for row in sets["prompts"])
    assert {json.loads(row["metadata"])["source_dataset"] for row in sets["held_out"]} == set(tasks.TASKS)
    for row in sets["train"] + sets["held_out"]:
        worked = row["completion"][0]["content"]
        assert tasks.solved(worked, row) == 1.0
        assert tasks.solved(worked.replace("<answer>", "<answer>7"), row) == 0.0
        assert tasks.solved(row["answer"], row) == 0.0  # without the tags


def test_fewer_rows_for_the_student_leave_the_others(data, tmp_path):
    whole = make_data(tmp_path, 3)
    for name in ("held_out.jsonl", "teacher/train.jsonl"):
        assert (data / name).read_bytes() == (whole / name).read_bytes()
    assert {row["question"] for row in rows(data / "train.jsonl")} < {row["question"] for row in rows(whole / "train.jsonl")}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "metadata", "steps"),
    [
        ("chain_sum", {"expression": "7 - 9 + 12"}, ["7 - 9 = -2", "-2 + 12 = 10"]),
        ("products", {"expression": "34 * 27"}, ["34 * 20 = 680", "34 * 7 = 238", "680 + 238 = 918"]),
        ("products", {"expression": "34 * 7"}, ["34 * 7 = 238"]),
        ("gcd", {"numbers": [12, 18]}, ["18 % 12 = 6", "12 % 6 = 0"]),
        ("leg_counting", {"animals": {"snake": 2, "dog": 3}}, ["snake: 2 * 0 = 0, 0 + 0 = 0", "dog: 3 * 4 = 12, 0 + 12 = 12"]),
        ("spell_backward", {"word": "sun"}, ["s u n", "n u s"]),
        ("letter_counting", {"span": ["egg", "gig"], "target_letter": "g"}, ["e g g: 2", "g i g: 4"]),
    ],
)  # fmt: skip
def test_steps(task, metadata, steps):
    assert getattr(tasks, task)(metadata) == steps


@pytest.fixture
def claim(saved, data, tmp_path, monkeypatch):
    """The script's folder with models and data; cells are written into `cells.txt` beside it."""
    out = tmp_path / "out"
    for name in ("student", "teacher", "base", "half"):
        shutil.copytree(saved / ("teacher" if name == "teacher" else "student"), out / name)
    (out / "student/trainer_state.json").touch()  # as its warm-up leaves it
    (out / "data").symlink_to(data)
    for name, value in {
        "OUT": out,
        "CELLS": tmp_path / "cells.txt",
        "CUDA_VISIBLE_DEVICES": "",
        "SEEDS": 1,
        "LEARNING_RATE": "1e-3",
        "OMP_NUM_THREADS": 1,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }.items():
        monkeypatch.setenv(name, str(value))
    return out


SCRIPT = str(REPO / "experiments/claim.sh")


def started(out):
    """As if the student had been measured."""
    bits = result("", 0, "1" + "0" * (3 * len(tasks.TASKS) - 1), "")
    models = {model: {kind: bits[kind] for kind in tables.KINDS} for model in ("student", "teacher")}
    write_results(out / "results/cells.jsonl", {"cell": "start", "seed": 1} | models)


def write_results(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_result(out, name, seed):
    """The one line of a cell and seed."""
    (record,) = [line for line in rows(out / "results/cells.jsonl") if (line["cell"], line["seed"]) == (name, seed)]
    return record


def finished(done, out):
    logs = "".join(path.read_text()[-2000:] for path in (out / "logs").iterdir())
    assert done.returncode == 0, done.stdout + done.stderr[-2000:] + logs
    return done.stdout


def check_cell(out, name, last):
    found = read_result(out, name, 1)
    assert found["cell"] == name
    assert found["flags"].endswith("--learning_rate 1e-3")
    assert found["steps"] == found["curve"][-1]["step"] == last
    assert found["sampled"]["rows"] == found["greedy"]["rows"] == 3 * len(tasks.TASKS)
    assert found["seconds_per_step"] > 0
    assert found["curve"][-1]["forward_kl"] > 0
    assert not list(out.glob(f"cells/{name}-1/checkpoint-*"))


@pytest.mark.slow
def test_claim_goes_on_after_a_kill_in_training(claim):
    started(claim)
    flags = f"--lmbda 0 --beta 0 {FAST} --max_steps 20 --save_steps 10"
    (claim.parent / "cells.txt").write_text(f"# name seeds flags\nours 1 {flags}\n")
    folder = claim / "cells/ours_lr_1e-3-1"
    assert "is not in" in run_command([SCRIPT, "our"]).stdout
    running = subprocess.Popen([SCRIPT, "ours"], start_new_session=True)
    wait_until(lambda: list(folder.glob("checkpoint-*")), running)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert list(folder.glob("checkpoint-*"))
    assert not (folder / "trainer_state.json").exists()
    stdout = finished(run_command([SCRIPT]), claim)
    assert "start-1: started" not in stdout
    log = (claim / "logs/ours_lr_1e-3-1.log").read_text()
    assert "step 20/20" in log
    assert "step 1/20" not in log
    check_cell(claim, "ours_lr_1e-3", 20)
    assert (claim / "results/curves.png").stat().st_size > 0
    assert "started" not in finished(run_command([SCRIPT]), claim)  # all cells have their line


@pytest.mark.slow
def test_claim_measures_its_start_and_its_peer(claim):
    (claim.parent / "cells.txt").write_text(
        f"# name seeds flags\nstock_theirs 2 --lmbda 1 --beta 0.5 {FAST} --use_cpu\n"
    )
    finished(run_command([SCRIPT]), claim)
    check_cell(claim, "stock_theirs_lr_1e-3", 2)
    lines = rows(claim / "results/cells.jsonl")
    assert {(line["cell"], line["seed"]) for line in lines} == {("start", 1), ("stock_theirs_lr_1e-3", 1)}  # SEEDS
    start = read_result(claim, "start", 1)
    for model in ("student", "teacher"):
        for kind in tables.KINDS:
            assert start[model][kind]["rows"] == 3 * len(tasks.TASKS)
            assert start[model][kind]["length"] > 0


def result(name, seed, solved, flags, curve=(), **more):
    """A cell's file; `solved` as a string of bits."""
    measured = {"rows": len(solved), "solved": f"{int(solved, 2):x}", "accuracy": solved.count("1") / len(solved)}
    measured |= {"entropy": 0.5, "forward_kl": 0.25, "length": 3.0, "tasks": {"gcd": measured["accuracy"]}}
    points = [{"step": step, "accuracy": accuracy} for step, accuracy in curve]
    return {"cell": name, "seed": seed, "flags": flags, "jobs": 1, "steps": 300, "seconds_per_step": 0.5, "curve": points,
            "sampled": measured, "greedy": measured, "training": []} | more  # fmt: skip


def test_a_cell_replaces_its_line_and_cells_that_end_at_once_lose_nothing(tmp_path):
    path = tmp_path / "results/cells.jsonl"
    records = [result(f"cell_{number % 7}", number, "01", "") for number in range(60)]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(functools.partial(collect.put, path), records))
    assert sorted(rows(path), key=lambda record: record["seed"]) == records
    before = rows(path)
    anew = result("cell_1", 1, "11", "--lmbda 1")
    collect.put(path, anew)
    assert rows(path) == [anew if (line["cell"], line["seed"]) == ("cell_1", 1) else line for line in before]


def test_a_file_of_results_is_whole_after_a_crash(tmp_path, monkeypatch):
    path = tmp_path / "cells.jsonl"
    collect.put(path, result("one", 1, "01", ""))
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError("the disk is gone")))
        with pytest.raises(OSError, match="gone"):
            collect.put(path, result("two", 1, "01", ""))
    assert path.read_bytes() == before
    collect.put(path, result("two", 1, "01", ""))  # the lock is free again
    assert [line["cell"] for line in rows(path)] == ["one", "two"]


def test_tables_by_hand(tmp_path):
    start = result("", 0, "0000000011", "")
    models = {"student": {k: start[k] for k in ("sampled", "greedy")}}
    teacher = result("", 0, "1111111110", "")
    models["teacher"] = {k: teacher[k] for k in ("sampled", "greedy")}
    records = (
        {"cell": "start", "seed": 1} | models,
        result("supervised_forward", 1, "0000000111", "--lmbda 0 --beta 0"),
        result("supervised_forward", 2, "0000001111", "--lmbda 0 --beta 0"),
        result("on_policy_jsd", 1, "0000111111", "--lmbda 1 --beta 0.5", seconds_per_step=1.5),
        result("supervised_jsd", 1, "0000001111", "--lmbda 0 --beta 0.5"),
        result("supervised_forward_longer", 1, "0000011111", "--lmbda 0 --beta 0", steps=900),
        result("mixed_jsd_longer", 1, "0000011111", "--lmbda 0.5 --beta 0.5", steps=225, jobs=4),
        result("mixed_jsd_longer", 2, "0000000000", "--lmbda 0.5 --beta 0.5", steps=225, jobs=4),  # lost everything
        result("supervised_forward_lr_1", 1, "0001111111", "--lmbda 0 --learning_rate 1"),
        result("on_policy_jsd_lr_1", 1, "0111111111", "--lmbda 1 --beta 1 --learning_rate 1", seconds_per_step=1.5),
        result("seq_kd", 1, "0000000111", "--lmbda 0 --seq_kd True", seconds_per_step=2.5),
        result("stock_100", 1, "0000011111", "--lmbda 1", [(50, 0.3), (100, 0.5)], steps=100, seconds_per_step=6.0),
        result("gkd_100", 1, "0000111111", "--lmbda 1", [(50, 0.6), (100, 0.6)], steps=100, seconds_per_step=1.5),
        result("on_policy_jsd_shared", 1, "0000111111", "--lmbda 1 --beta 0.5", seconds_per_step=9.0, jobs=4),
        {"cell": "on_policy_timed", "seed": 1, "flags": "--lmbda 1", "jobs": 1, "seconds_per_step": 1.5},
        result(
            "auto_jsd",
            1,
            "0000111111",
            "--lmbda auto --beta 0.5 --lmbda_probe_steps 50",
            jobs=4,
            training=[{"lmbda_since": 200.0, "lmbda_probes": 4.0}],
        ),
        result(
            "auto_jsd",
            2,
            "0000111111",
            "--lmbda auto --beta 0.5 --lmbda_probe_steps 50",
            jobs=4,
            training=[{"lmbda_probes": 6.0}],
        ),
    )
    write_results(tmp_path / "early/cells.jsonl", *reversed(records))  # in any order
    grids = tables.load([tmp_path / "early"])
    cells = grids["early"][1]
    cell = cells["on_policy_jsd"]
    assert cell.spreads["sampled"] == (pytest.approx(0.1 / 2), 2)  # of 0.3 and 0.4, and of two that are alike
    assert "on_policy_timed" not in cells
    cell.spreads["sampled"] = (0.01, 9)
    made = tables.all_tables(grids, tables.seconds_per_step([tmp_path / "early"]))

    def lines(name):
        return {line.split("|")[1].strip(): line for line in made[f"early/{name}"].splitlines()}

    steps = {name: [c.strip() for c in line.split("|")] for name, line in lines("steps").items()}
    assert steps["`supervised_forward`"][3:5] == ["2", "35.0"]
    assert steps["`supervised_forward`"][5].startswith("+15.0 [")
    assert steps["`on_policy_jsd`"][5].startswith("+40.0 [")
    assert steps["`on_policy_jsd`"][6].startswith("+25.0 [")
    assert steps["`on_policy_jsd_lr_1`"][6].startswith("+20.0 [")  # minus that of the same learning rate
    assert steps["`supervised_forward_lr_1`"][6] == ""

    def values(name):
        lines = made[f"all/{name}"].splitlines()[2:]
        return [[c.strip().split(" [")[0] for c in line.split("|")[1:-1]] for line in lines]

    usual, auto, other = values("claim")
    assert auto[3:6] == ["`--lmbda auto --beta 0.5`", "2, 2", "+40.0"]
    assert usual[:5] == ["early, 20.0 %", "3e-4", "300", "`--lmbda 1 --beta 0.5`", "1, 2"]
    assert usual[5:] == ["+40.0", "+25.0", "–", "+20.0", "+25.0", "+20.0"]  # ten rows leave the baseline's gain open
    assert other[1:5] == ["1", "300", "`--lmbda 1 --beta 1`", "1, 1"]
    assert other[5:] == ["+70.0", "+20.0", "1.40", "", "+20.0", ""]
    usual, auto = values("equal_seconds")
    assert usual[3:] == ["`--lmbda 1 --beta 0.5`", "450", "900: `--lmbda 0 --beta 0`", "450", "1, 1", "+10.0", "+10.0"]
    assert auto[3:7] == ["`--lmbda auto --beta 0.5`", "223", "225: `--lmbda 0.5 --beta 0.5`", "225"]
    assert auto[7:] == ["2, 1 of 2", "+10.0", "+10.0"]
    assert steps["teacher"][4] == "90.0"
    assert "`gkd_100`" not in steps
    seconds = lines("seconds")
    assert "| 300 | 150 |" in seconds["`supervised_forward`"]
    assert "| 300 | 450 |" in seconds["`on_policy_jsd`"]
    assert "| 300 | 450 |" in seconds["`on_policy_jsd_shared`"]
    assert "| 300 | 750 |" in seconds["`seq_kd`"]
    # Four probes of six steps, two measurements each and two more, then half of 100 steps on-policy; or six probes.
    costs = [1.5 * (4 * (6 + 2) + 2 + 50) + 0.5 * (250 - 4 * 6), 1.5 * (6 * (6 + 2) + 2) + 0.5 * (300 - 6 * 6)]
    assert f"| 300 | {sum(costs) / 2:.0f} |" in seconds["`auto_jsd`"]
    peer = lines("peer")
    assert "| 50.0 % in 600 s | 3.0 |" in peer["`stock_100`"]  # 30 points in 10 minutes
    assert "| +10.0 [" in peer["`gkd_100`"]
    assert "| 50.0 % in 56 s | 16.0 |" in peer["`gkd_100`"]  # on the line from 20 % to 60 % in 50 steps
    assert cells["gkd_100"].steps_to(0.65) != cells["gkd_100"].steps_to(0.65)  # never: nan

    cell.spreads["sampled"] = (0.0, 9)
    over_rows = cell.gains("sampled")
    assert over_rows.mean() == pytest.approx(0.4, abs=0.02)
    assert over_rows.std() == pytest.approx((0.4 * 0.6 / 10) ** 0.5, abs=0.02)  # binomial
    cell.spreads["sampled"] = (0.1, 9)
    both = cell.gains("sampled")
    assert both.var() == pytest.approx(over_rows.var() + 0.1**2 * 9 / 7, rel=0.15)  # Student's t


def test_each_run_has_its_own_start(tmp_path):
    for run, started, ended in (("one", "0000000001", "0000000111"), ("two", "0000011111", "0011111111")):
        found = {kind: result("", 0, started, "")[kind] for kind in tables.KINDS}
        start = {"cell": "start", "seed": 1, "student": found, "teacher": found}
        cell = result("on_policy_jsd", 1, ended, "--lmbda 1", [(300, ended.count("1") / 10)])
        write_results(tmp_path / f"late/{run}.jsonl", start, cell)
    start, cells = tables.load([tmp_path / "late"])["late"]
    cell = cells["on_policy_jsd"]
    assert start["student"]["greedy"]["accuracy"] == pytest.approx(0.3)
    assert [seed["sampled"]["accuracy"] for seed in cell.seeds] == [0.3, 0.8]
    assert cell.gain("sampled") == pytest.approx((0.2 + 0.3) / 2)
    assert cell.curve() == ([0, 300], [pytest.approx(0.3), pytest.approx(0.55)])
    cell.spreads["greedy"] = (0.0, 1)
    drawn = cell.gains("greedy")  # five rows of ten change, by a half
    assert drawn.mean() == pytest.approx(0.25, abs=0.01)
    assert drawn.std() == pytest.approx((0.25 * 0.25 / 10) ** 0.5, rel=0.1)
    other = tables.Cell("supervised", cell.seeds[1:], cell.spreads)  # of the second run alone
    assert tables.minus(cell, other, "sampled").startswith("+0.0 [")  # 0.3 less 0.3
    first = tables.Cell("first", cell.seeds[:1], cell.spreads)
    assert re.fullmatch(r"\+10\.0 \[.*\] †", tables.minus(other, first, "sampled"))  # no run in common
    with pytest.raises(SystemExit, match="no start"):
        tables.load([tmp_path])
    write_results(tmp_path / "late/three.jsonl", result("on_policy_jsd", 2, "01", "--lmbda 1"))
    with pytest.raises(SystemExit, match=r"three.jsonl: no start"):
        tables.load([tmp_path / "late"])


def test_a_seed_that_lost_everything_is_counted_and_in_no_mean(tmp_path):
    start = result("", 0, "0011", "")
    begin = {"cell": "start", "seed": 1} | {
        model: {k: start[k] for k in ("sampled", "greedy")} for model in ("student", "teacher")
    }
    good, lost = (
        result("mixed_jsd", seed, bits, "--lmbda 0.5 --beta 0.5") for seed, bits in ((1, "0111"), (2, "0000"))
    )
    for run, records in {"a": [good], "b": [lost], "c": [lost | {"cell": "mixed_forward"}]}.items():
        write_results(tmp_path / f"grid/{run}.jsonl", begin, *records)
    cells = tables.load([tmp_path / "grid"])["grid"][1]
    assert cells["mixed_jsd"].count == "1 of 2"
    assert cells["mixed_jsd"].mean("sampled") == 0.75
    assert cells["mixed_jsd"].within({"a"}).count == "1"
    assert (cells["mixed_forward"].count, cells["mixed_forward"].mean("sampled")) == ("1", 0)  # it has no other


def test_a_report_takes_its_tables():
    text = "a\n<!-- far/steps -->\nold\n<!-- end -->\nb\n<!-- near/steps -->\n<!-- end -->\n"
    made = tables.filled(text, {"far/steps": "| new |", "near/steps": "| s |", "near/tasks": "| t |"})
    assert made == "a\n<!-- far/steps -->\n| new |\n<!-- end -->\nb\n<!-- near/steps -->\n| s |\n<!-- end -->\n"
    with pytest.raises(KeyError, match="near/steps"):
        tables.filled(text, {"far/steps": "| x |"})


def test_the_reports_tables_are_those_of_its_results():
    report = tables.REPORT.read_text(encoding="utf-8")
    folders = [*tables.RESULTS.iterdir()]
    filled = tables.filled(report, tables.all_tables(tables.load(folders), tables.seconds_per_step(folders)))
    told, made = (re.split(r"(\d+\.?\d*)", text) for text in (report, filled))
    assert told[::2] == made[::2], "experiments/claim/tables.py --write"
    # The bootstrap's draws may move with numpy.
    assert [float(x) for x in told[1::2]] == pytest.approx([float(x) for x in made[1::2]], rel=0.02, abs=0.3)


@pytest.mark.parametrize("page", ["docs/on_policy.md", "docs/zh/on_policy.md"])
def test_the_pages_figures_are_the_reports(page):
    figures = re.findall(r"[+-]\d+\.\d \[.*?\]", (REPO / page).read_text(encoding="utf-8"))
    report = tables.REPORT.read_text(encoding="utf-8")
    assert len(figures) > 10
    assert [figure for figure in figures if figure not in report] == []
