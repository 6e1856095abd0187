"""The benchmarks run in their small shapes on a CPU, and write what they promise. No time is asserted."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys

import pytest
from tiny import REPO

sys.path.insert(0, str(REPO / "benchmarks"))

import common
import decode
import divergence
import growth
import parallelism
import scaling
import served
import small_gpu
import step_time
import teacher_cache
import torch
import vllm_peer
from steps import STEP_SHAPES, Run, floor
from transformers import AutoModelForCausalLM

import train_gkd
from gkd.generation import generator


def run_here(module, monkeypatch, out, *words):
    """Runs a benchmark with its variants in this process, which saves their imports; returns its JSON."""

    def in_this_process(variants, args, *rest, **more):
        rows = []
        for variant in variants:
            argv = list(sys.argv)
            sys.argv += ["--variant", variant]
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                module.main()
            sys.argv = argv
            rows += common.rows_of(printed.getvalue().splitlines())
        return rows

    out.mkdir(exist_ok=True)
    monkeypatch.setattr(sys, "argv", [module.__file__, "--out", str(out), *words])
    monkeypatch.setattr(module, "run_all", in_this_process)
    monkeypatch.setenv("TMPDIR", str(out))
    monkeypatch.setattr("tempfile.tempdir", None)
    module.main()
    name = module.__name__
    table = (out / f"{name}.md").read_text(encoding="utf-8")
    result = json.loads((out / f"{name}.json").read_text())
    assert {"command", "date", "device", "versions", "rows", "notes"} <= result.keys()
    for row in result["rows"]:
        assert f"| {row['run']} |" in table
    return result


def test_step_time(monkeypatch, tmp_path):
    modes = ("stock:on_policy", "distillation:on_policy", "gkd:on_policy", "stock:seq_kd", "gkd:seq_kd")
    runs = [*modes, "gkd:off_policy", "gkd:mix_each_step@3", "gkd:mix@3"]
    words = ["--shape", "tiny", "--steps", "2", "--runs", *runs]
    result = run_here(step_time, monkeypatch, tmp_path / "out", *words)
    rows = {row["run"]: row for row in result["rows"]}
    assert list(rows) == [*runs, "gkd:mix_epoch2@3"]
    shape = STEP_SHAPES["tiny"]
    for row in rows.values():
        if row["mode"] != "mix_epoch2":
            assert row["starting"] > 0
            assert row["first_extra"] == pytest.approx(row["first"] - row["median"])
    row = rows["gkd:off_policy"]
    text = 4 * (shape.prompt + shape.new)
    trained = round(row["trained_per_second"] * row["training"])
    assert text <= trained <= text + 4  # a line feed behind an answer
    for name, row in rows.items():
        assert len(row["seconds"]) == (3 if name.endswith("@3") else 2)
        assert row["floor"] > 0
        assert row["tokens"] <= shape.batch * shape.accumulation * (shape.new + 1)
    assert rows["gkd:off_policy"]["tokens"] == shape.batch * shape.accumulation * shape.new
    assert all("teacher/loss" in log for log in rows["gkd:seq_kd"]["logs"])
    assert len(result["notes"]) == 4  # stock's mix derived; gkd's measured, and its second epoch


def test_a_step_time_run_that_makes_no_sense_is_refused(monkeypatch, capsys):
    runs = ["distillation:mix", "gkd:mix_epoch2", "stock:mix_each_step", "gkd:on_policy@1", "trl:mix", "gkd"]
    for run in (*runs, "distillation_vllm:off_policy", "huge/gkd:mix", "gkd:mix@four", "gkd:mix@2@3@4"):
        monkeypatch.setattr(sys, "argv", ["step_time.py", "--runs", run])
        with pytest.raises(SystemExit):
            step_time.main()
        assert run in capsys.readouterr().err


@pytest.mark.skipif(common.CUDA, reason="takes the CPU's way")
@pytest.mark.parametrize("launcher", ["zero2", "fsdp2"])
def test_a_launcher_that_needs_gpus_is_refused_without(monkeypatch, capsys, launcher):
    monkeypatch.setattr(sys, "argv", ["step_time.py", "--ranks", "2", "--launcher", launcher])
    with pytest.raises(SystemExit):
        step_time.main()
    assert f"--launcher {launcher} needs GPUs" in capsys.readouterr().err


def test_a_run_names_its_shape_steps_and_seconds():
    assert Run.parse("seed/gkd:mix@20@90", 8, "tiny") == Run("gkd", "mix", 20, "seed", 90)
    assert Run.parse("stock:mix", 8, "long") == Run("stock", "mix", 8, "long", None)


def test_distillation_with_vllm_is_skipped_where_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm_peer, "MISSING", "skipped: vllm is not installed")
    for module, words in (
        (step_time, ["--runs", "distillation_vllm:on_policy"]),
        (decode, ["--models", "student", "--modes", "vllm"]),
    ):
        (row,) = run_here(module, monkeypatch, tmp_path / module.__name__, *words)["rows"]
        assert row["failed"] == vllm_peer.MISSING


def test_vllm_reads_the_student_of_the_trainer_and_stops_as_it_does(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shape = STEP_SHAPES["tiny"]
    student, _ = step_time.models("distillation_vllm", dataclasses.replace(shape, hazard=1 / 4))
    settings = vllm_peer.settings(student, 100, 0.3)
    assert settings["generation_kwargs"]["stop_token_ids"] == common.stop_ids(2048, 1 / 4)
    read = AutoModelForCausalLM.from_pretrained(student.name_or_path)
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), student.parameters(), strict=True))
    assert vllm_peer.settings(read, 100, 0.3) == settings


def test_what_lengths_cost_is_noted_where_both_shapes_ran():
    rows = [
        {"shape": shape, "trainer": "gkd", "mode": "on_policy", "training": 2.0, "trained_per_second": speed}
        for shape, speed in (("tail64", 9000), ("equal64", 12000))
    ]
    assert step_time.tail_notes(rows) == [
        "gkd:on_policy: a token of tail64 trains at 75.0% of the speed of equal64's."
    ]
    assert step_time.tail_notes(rows[:1]) == []


def test_the_table_of_the_tail_has_runs_that_exist_and_ends_in_time(tmp_path):
    (tmp_path / "python3").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    script, environment = REPO / "benchmarks/tail.sh", os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [script, "--steps", "4"], env=environment, capture_output=True, text=True, check=True, cwd="/"
    )
    words = done.stdout.splitlines()
    assert words[0] == "benchmarks/step_time.py"
    assert words[-2:] == ["--steps", "4"]
    assert int(words[words.index("--total") + 1]) < 480
    runs = [Run.parse(word, 8, "tiny") for word in words[words.index("--runs") + 1 : -2]]
    assert len(runs) == 9
    assert all(run.problem() is None and run.limit for run in runs)


def test_the_floor_of_a_step_counts_products_and_reads():
    shape = STEP_SHAPES["seed"]
    off_policy, seq_kd, mix = (floor(shape, mode, 780e12, 3e12) for mode in ("off_policy", "seq_kd", "mix"))
    # Teacher 7.0e9 in its layers, student 1.0e9 twice, 1152 tokens; heads at 768; 128 reads of 7.5e9 weights.
    assert off_policy == pytest.approx(2 * (1152 * 8.93e9 + 768 * 1.05e9) / 780e12, rel=0.01)
    read = 7.5e9 if common.CUDA else 2 * 7.5e9  # bf16, or fp32
    assert seq_kd - off_policy == pytest.approx(128 * 2 * read / 3e12, rel=0.01)
    assert off_policy < mix < seq_kd


@pytest.mark.slow
def test_divergence(monkeypatch, tmp_path):
    rows = run_here(divergence, monkeypatch, tmp_path)["rows"]
    assert len(rows) == 4 * len(divergence.CASES)
    for row in rows:
        if row["variant"] == "Liger" and divergence.LigerFusedLinearJSDLoss is None:
            assert row["failed"] == "not installed"
            continue
        assert row["ms"] > 0
        assert row["loss_error"] < 1e-4
        assert row["gradient_error"] < 1e-4
        assert row["trains"] == ("head_error" in row)
    assert all(row["to_gkd"] == 1.0 for row in rows if row["variant"] == "gkd")


def test_decode(monkeypatch, tmp_path):
    rows = run_here(decode, monkeypatch, tmp_path, "--calls", "3")["rows"]
    expected = {("student", mode) for mode in decode.MODES}
    expected |= {("teacher", mode) for mode in decode.MODES if mode != "dynamic_merged"}
    assert {(row["model"], row["mode"]) for row in rows} == expected
    assert len(rows) == len(expected) * len(decode.LOADS)
    for row in rows:
        assert len(row["calls"]) == 3
        assert 0 < row["mean_length"] <= int(row["load"].split("+")[1])
        assert ("captures" in row) == (row["mode"] == "gkd")


def test_scaling_and_its_picture_from_a_file(monkeypatch, tmp_path):
    result = run_here(scaling, monkeypatch, tmp_path, "--steps", "2")
    assert [row["run"] for row in result["rows"]] == scaling.POINTS  # both axes, one process each
    assert all(("divergence_ms" in row) == (row["axis"] == "vocabulary") for row in result["rows"])
    assert len(result["notes"]) >= 3
    picture = tmp_path / "scaling.png"
    picture.unlink()
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--plot", str(tmp_path / "scaling.json")])
    scaling.main()
    assert picture.stat().st_size > 1000


@pytest.mark.skipif(common.CUDA, reason="takes the small points of a CPU")
def test_growth_and_its_picture(monkeypatch, tmp_path):
    result = run_here(growth, monkeypatch, tmp_path)
    rows = {row["run"]: row for row in result["rows"]}
    assert list(rows) == list(growth.POINTS)
    for name, row in rows.items():
        point = growth.POINTS[name]
        assert len(row["seconds"]) == point.steps
        assert 0 < row["mean_new"] <= point.cap
        assert row["step"] == pytest.approx(row["generating"] + row["training"])
        assert row["together"] == point.rows
        assert row["choices"] is None
    assert rows["full:32"]["mean_new"] == 32
    assert len(result["notes"]) == 4
    assert (tmp_path / "growth.png").stat().st_size > 1000


@pytest.mark.skipif(common.CUDA, reason="takes the small points of a CPU")
def test_growth_tells_what_memory_made_of_a_point(monkeypatch, tmp_path):
    generate, most = generator.generate_dynamic, 2

    def short_of_memory(model, prompts, *rest):
        if len(prompts) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(model, prompts, *rest)

    monkeypatch.setattr(generator, "generate_dynamic", short_of_memory)
    (row,) = run_here(growth, monkeypatch, tmp_path / "fewer", "--points", "rows:4")["rows"]
    assert (row["together"], row["choices"]) == (2, "generation_rows 2")
    most = 0
    (row,) = run_here(growth, monkeypatch, tmp_path / "none", "--points", "rows:4")["rows"]
    assert "ut of memory" in row["failed"]


def test_small_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(small_gpu.static_decoding, "device_memory", small_gpu.static_decoding.device_memory)
    (row,) = run_here(small_gpu, monkeypatch, tmp_path, "--shape", "tiny", "--steps", "3", "--caps", "16")["rows"]
    assert row["steps"] == 2
    assert row["cap"] == pytest.approx(15.2)
    assert row["student_seconds"] > 0
    assert row["teacher_seconds"] > 0
    assert row["width"] == 96
    assert small_gpu.static_decoding.device_memory(torch.device("cuda")) == 16 * 2**30
    assert not (tmp_path / "pair").exists()


@pytest.mark.parametrize("cap", small_gpu.CAPS)
def test_small_gpu_runs_the_command_of_the_script(tmp_path, cap):
    (tmp_path / "accelerate").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "accelerate").chmod(0o755)
    script = REPO / f"experiments/small_gpu_{cap}gb.sh"
    places = {"STUDENT": "a student", "TEACHER": "t", "DATA": "d.json", "OUT": "o"}
    environment = os.environ | places | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([script, "--seed", "1"], env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[words.index("train_gkd.py") + 1 :] == [*small_gpu.script_flags(script, **places), "--seed", "1"]


def test_teacher_cache(monkeypatch, tmp_path, saved):
    pair = ["--student", str(saved / "student"), "--teacher", str(saved / "teacher"), "--max_new_tokens", "8"]
    words = [
        "--runs",
        "tiny:live",
        "tiny:topk",
        "tiny:hidden",
        "error",
        "--steps",
        "2",
        "--rows",
        "3",
        "--train_steps",
        "1",
        *pair,
    ]
    words += ["--dataset_name", str(REPO / "data/prompts_train.json")]
    rows = run_here(teacher_cache, monkeypatch, tmp_path / "out", *words)["rows"]
    assert [row["run"] for row in rows[:3]] == ["tiny:live", "tiny:topk", "tiny:hidden"]
    assert all(len(row["seconds"]) == 2 for row in rows[:3])
    assert rows[1]["caching"] > 0
    assert rows[2]["bytes"] > 4 * 256  # fp32 on the CPU
    for four in (rows[3:7], rows[7:11]):  # before and after the training
        for less, more in itertools.pairwise(four):
            assert less["bytes"] < more["bytes"]
            for beta in teacher_cache.BETAS:
                assert 0 < less[f"kept_{beta}"] <= more[f"kept_{beta}"] < 1.001
                assert less[f"gradient_{beta}"] > more[f"gradient_{beta}"]
    assert len(rows) == 11


def test_served(monkeypatch, tmp_path):
    words = ["--steps", "2", "--runs", "tiny:here:on_policy", "tiny:device:on_policy", "tiny:server:on_policy"]
    rows = run_here(served, monkeypatch, tmp_path, *words)["rows"]
    assert [row["off"] for row in rows] == [0, 0, 0]
    assert rows[2]["sent"] == pytest.approx(2 * 2 * 8 * 256 * 4 / 1e6)


def test_parallelism(monkeypatch, tmp_path):
    words = ["--variants", "teacher_elsewhere", "--shape", "micro", "--steps", "2"]
    started = []

    def in_this_process(words, limit):
        started.append(words)
        train_gkd.main(words[words.index("train_gkd.py") + 1 :])
        return 0

    monkeypatch.setattr(parallelism, "launch", in_this_process)
    result = run_here(parallelism, monkeypatch, tmp_path, *words)
    first, second = result["rows"]
    assert [row["lmbda"] for row in (first, second)] == [0, 1]
    assert all(len(row["losses"].split()) == len(row["norms"].split()) == 2 for row in (first, second))
    assert first["losses"] != second["losses"]
    assert all("accelerate.commands.launch" in command for command in started)


def test_random_models_leave_the_default_dtype_alone():
    model = common.random_model(STEP_SHAPES["tiny"].student, seed=0)
    assert torch.get_default_dtype() is torch.float32
    layers, head = common.weights(STEP_SHAPES["tiny"].student)
    counted = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert layers + head == counted


@pytest.mark.slow
@pytest.mark.skipif(common.CUDA, reason="takes the CPU's way")
def test_a_benchmark_as_a_command_on_two_ranks(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, REPO / "benchmarks/step_time.py", "--out", out, "--ranks", "2", "--launcher", "ddp"]
    command += ["--steps", "2", "--runs", "tiny/gkd:on_policy"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    (row,) = json.loads((out / "step_time.json").read_text())["rows"]
    assert row["run"] == "tiny/gkd:on_policy"
    assert row["device"].startswith("CPU")
    assert "failed" not in row
    assert "generating" in row
    shape = STEP_SHAPES["tiny"]
    assert row["tokens"] > shape.batch * shape.accumulation * shape.new  # of both
    assert (out / "logs" / "step_time-tiny-gkd-on_policy.log").stat().st_size > 0


STAND_IN = """
import os, pathlib, sys, time
variant = sys.argv[-1]
print("some text")
cache = pathlib.Path(os.environ.get("TRITON_CACHE_DIR", os.environ["TMPDIR"]))
warm = os.path.exists(cache / "kernel")
cache.mkdir(exist_ok=True)
(cache / "kernel").write_text("")
print('RESULT {"run": "%s", "ms": 1.5, "warm": %d, "device": "none"}' % (variant, warm), flush=True)
if variant == "fails":
    raise ValueError("no such thing")
if variant == "dies":
    sys.exit(3)
if variant == "slow":
    time.sleep(60)
"""


def test_a_variant_that_fails_or_takes_too_long_is_a_row(monkeypatch, tmp_path, capsys):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(sys, "argv", [str(script)])
    args = common.parser("", "x", limit=2).parse_args(["--out", str(tmp_path / "out")])
    columns = [common.Column("run", "run"), common.Column("ms", "ms", ".1f")]
    rows = common.run_all(["works", "fails", "dies", "slow"], args, columns)
    common.write(args, columns, rows, ["a note"])
    assert [(row["run"], row.get("failed")) for row in rows] == [
        ("works", None),
        ("fails", None),
        ("fails", "ValueError: no such thing"),
        ("dies", None),
        ("dies", "some text"),
        ("slow", None),
        ("slow", "not finished in 2 s"),
    ]
    assert (tmp_path / "out/logs/stand_in-fails.log").read_text().startswith("some text")
    table = (tmp_path / "out/stand_in.md").read_text()
    assert "| works | 1.5 |" in table
    assert "| slow | not finished in 2 s |" in table
    assert table.endswith("* a note\n")
    assert "works: ms 1.5" in capsys.readouterr().out


def test_a_variant_that_starts_twice_finds_its_own_caches(monkeypatch, tmp_path):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(sys, "argv", [str(script)])
    args = common.parser("", "x", limit=20).parse_args(["--out", str(tmp_path / "out")])
    rows = common.run_all(["a", "b"], args, [common.Column("run", "run")], starts=2)
    assert [(row["run"], row["start"], row["warm"]) for row in rows] == [
        ("a", 1, 0),
        ("a", 2, 1),
        ("b", 1, 0),
        ("b", 2, 1),
    ]
    assert (tmp_path / "out/logs/stand_in-b-2.log").is_file()


def test_variants_end_when_their_time_is_over_and_leave_a_table(monkeypatch, tmp_path):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(sys, "argv", [str(script)])
    args = common.parser("", "x", limit=50).parse_args(["--out", str(tmp_path / "out"), "--total", "4"])
    so_far = []
    rows = common.run_all(
        ["works", "slow", "a"],
        args,
        [common.Column("run", "run")],
        limits={"slow": 40},
        done=lambda rows: so_far.append(len(rows)),
    )
    assert [row.get("failed", "").split(" in ")[0] for row in rows] == [
        "",
        "",
        "not finished",
        "not started: the time of all variants is over",
    ]
    assert so_far == [1, 3, 4]


def test_the_reason_of_a_failure_is_the_line_that_names_it():
    lines = ["Traceback", "[rank0]: torch.OutOfMemoryError: CUDA out of memory.", "", "E1 a launcher says more", "x"]
    assert common.reason_of(lines, 1) == "[rank0]: torch.OutOfMemoryError: CUDA out of memory."
    assert common.reason_of([], 9) == "exit code 9"
