"""Flags, rows and models that change on resume: the change is applied and reported, or refused before weights load."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import REPO, ROWS, make_model, make_tokenizer
from transformers import get_scheduler

import export_model
import train_gkd
from gkd.report.write import write_report
from gkd.runs.record import read_record

FLAGS = [
    *("--max_new_tokens", "8", "--max_length", "100", "--per_device_train_batch_size", "2", "--max_steps", "6"),
    *("--save_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-2", "--lmbda", "0", "--preflight", "off"),
    *("--report_to", "none", "--disable_tqdm", "True"),
]


@pytest.fixture(scope="module")
def home(saved, tmp_path_factory):
    """A folder with models, rows and two runs of six steps: `full` and, with LoRA, `lora`."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(saved, home, dirs_exist_ok=True)
    make_model(seed=2, hidden_size=48).save_pretrained(home / "other")
    make_tokenizer().save_pretrained(home / "other")
    (home / "rows.json").write_text(json.dumps(ROWS * 3))
    train(home, home / "full")
    train(home, home / "lora", "--use_peft", "--lora_r", 4)
    return home


def train(home, out, *flags):
    """The command, in this process; sys.argv is what the user would have typed."""
    words = ["--model_name_or_path", home / "student", "--teacher_model_name_or_path", home / "teacher"]
    words = [str(word) for word in (*words, "--dataset_name", home / "rows.json", "--output_dir", out, *FLAGS, *flags)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(REPO / "train_gkd.py"), *words])
        train_gkd.main(words)


def refused(home, out, *flags):
    """The message of a command that ends before a model loads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gkd.models.loading.load_student", lambda *a: pytest.fail("a model was loaded"))
        with pytest.raises(SystemExit) as stop:
            train(home, out, *flags)
    (line,) = str(stop.value.code).splitlines()
    print(line)
    return line


def logs(out):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry for entry in history if "learning_rate" in entry}


def test_nothing_is_told_where_nothing_has_changed(home, tmp_path, capsys):
    train(home, tmp_path / "again", "--resume_from_checkpoint", home / "full/checkpoint-2")
    assert "from step" not in capsys.readouterr().out
    weights = [(out / "model.safetensors").read_bytes() for out in (home / "full", tmp_path / "again")]
    assert weights[0] == weights[1]
    assert len(read_record(tmp_path / "again")["history"]) == 1


def test_changes_apply_from_the_resumed_step_and_are_told(home, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--learning_rate", 1e-3, "--lr_scheduler_type", "cosine", "--max_steps", 8, "--weight_decay", 0.5]
    flags += ["--beta", 0.25, "--logging_steps", 2, "--save_steps", 4]
    train(home, out, *flags, "--resume_from_checkpoint", home / "full/checkpoint-2")
    told = [line for line in capsys.readouterr().out.splitlines() if " from step " in line]
    assert set(told) == {
        "learning_rate 0.01 -> 0.001 from step 2",
        "lr_scheduler_type linear -> cosine from step 2",
        "max_steps 6 -> 8 from step 2",
        "weight_decay 0.0 -> 0.5 from step 2",
        "beta 0.5 -> 0.25 from step 2",
        "logging_steps 1.0 -> 2 from step 2",
        "save_steps 2 -> 4 from step 2",
    }
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=8)
    for step in range(1, 9):
        if step > 2 and step in logs(out):
            assert logs(out)[step]["learning_rate"] == schedule.get_last_lr()[0], step
        optimizer.step()
        schedule.step()
    assert [step for step in logs(out) if step > 2] == [4, 6, 8]
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    state = torch.load(out / "checkpoint-8/optimizer.pt", weights_only=True)
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.5, 0.0]
    first, second = read_record(out)["history"]
    assert (first["step"], first["arguments"]["learning_rate"]) == (0, 1e-2)
    assert (second["step"], second["changed"]["learning_rate"]) == (2, [1e-2, 1e-3])
    for name in ("report.md", "report.html"):
        page = (out / name).read_text(encoding="utf-8")
        assert "Values changed on resume" in page
    assert "| 2 | `learning_rate` | 0.01 | 0.001 |" in (out / "report.md").read_text(encoding="utf-8")


def test_the_first_step_has_the_new_learning_rate(home, tmp_path):
    train(home, tmp_path / "run", "--learning_rate", "3e-3", "--resume_from_checkpoint", home / "full/checkpoint-4")
    assert logs(tmp_path / "run")[5]["learning_rate"] == pytest.approx(3e-3 * 2 / 6)


def test_another_kind_of_schedule(home, tmp_path):
    flags = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps", "--eval_steps", 2]
    flags += ["--eval_dataset_name", home / "rows.json", "--resume_from_checkpoint", home / "full/checkpoint-4"]
    train(home, tmp_path / "run", *flags)
    assert logs(tmp_path / "run")[5]["learning_rate"] == 1e-2


def test_history_is_cut_where_a_run_goes_back(home, tmp_path, capsys):
    out = tmp_path / "run"
    train(home, out, "--learning_rate", "5e-3", "--resume_from_checkpoint", home / "full/checkpoint-2")
    again = ["--learning_rate", "5e-3", "--beta", 1, "--resume_from_checkpoint"]
    train(home, out, *again, out / "checkpoint-4")
    steps = [[2, "learning_rate", 1e-2, 5e-3], [4, "beta", 0.5, 1.0]]
    assert changes(out) == steps
    train(home, out, *again, out / "checkpoint-6")  # nothing left to do, and nothing new
    assert changes(out) == steps
    train(home, out, "--resume_from_checkpoint", out / "checkpoint-4")
    assert changes(out) == [steps[0], [4, "learning_rate", 5e-3, 1e-2]]
    write_report(out, out)
    assert "beta 0.5" not in capsys.readouterr().out.rpartition("from step 4")[2]


def test_no_step_is_left_for_a_change(home, tmp_path):
    """Otherwise run.json and the report would show a value that was never used."""
    last = home / "full/checkpoint-6"
    line = refused(home, tmp_path / "run", "--learning_rate", "9e-3", "--resume_from_checkpoint", last)
    assert "checkpoint-6 has all steps of this run, so this would apply to none: learning_rate 0.01 -> 0.009." in line
    line = refused(home, tmp_path / "run", "--max_steps", 3, "--resume_from_checkpoint", home / "full/checkpoint-4")
    assert "checkpoint-4 has all steps of this run, 4 of 3." in line


def changes(out):
    entries = read_record(out)["history"]
    return [[e["step"], name, *pair] for e in entries for name, pair in e.get("changed", {}).items()]


def test_text_written_ahead_is_dropped_where_its_flags_change(home, tmp_path):
    flags = ["--seq_kd", "True", "--resume_from_checkpoint", "auto"]
    train(home, tmp_path / "run", *flags, "--max_steps", 4)
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    assert list((tmp_path / "run/checkpoint-2").glob("*pending*"))
    train(home, tmp_path / "run", *flags, "--lmbda", 1)
    for step, log in logs(tmp_path / "run").items():
        assert ("on_policy/loss" in log, "teacher/loss" in log) == (step > 2, step <= 2), step


REFUSED = {
    "seed": ("full", ["--seed", 7], "seed: seed 42 -> 7."),
    "batch": ("full", ["--gradient_accumulation_steps", 2], "batch: batch 2 -> 4 rows a step"),
    "optimizer": ("full", ["--optim", "sgd"], "optimizer: optim adamw_torch_fused -> sgd."),
    "sharding": ("full", [], "optimizer: sharding by nothing -> by FSDP."),
    "LoRA on": ("full", ["--use_peft"], "LoRA: use_peft False -> True."),
    "student": ("full", ["--model_name_or_path", "{home}/other"], "student: model_name_or_path {home}/student -> "),
    "teacher": (
        "full",
        ["--teacher_model_name_or_path", "{home}/other"],
        "teacher: teacher_model_name_or_path {home}/",
    ),
    "teacher's adapter": (
        "full",
        ["--teacher_adapter", "{home}/lora"],
        "teacher: teacher_adapter None -> {home}/lora.",
    ),
    "data": (
        "full",
        ["--dataset_name", "{home}/fewer.json"],
        "data: dataset_name {home}/rows.json -> {home}/fewer.json.",
    ),
    "cut rows": ("full", ["--max_length", 20], "data: max_length 100 -> 20."),
    "LoRA's rank": ("lora", ["--use_peft", "--lora_r", 8], "LoRA: lora_r 4 -> 8."),
    "LoRA off": ("lora", [], "LoRA: use_peft True -> False"),
    "LoRA's seed": ("lora", ["--use_peft", "--lora_r", 4, "--seed", 7], "seed: seed 42 -> 7."),
}
STARTS = {"seed", "student", "LoRA's rank", "LoRA's seed"}  # a way to start anew each


@pytest.mark.parametrize("case", REFUSED)
def test_a_change_that_is_refused_names_a_command_that_works(home, tmp_path, monkeypatch, case):
    run, flags, said = REFUSED[case]
    (home / "fewer.json").write_text(json.dumps(ROWS * 2))
    if case == "sharding":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as a launcher does
    flags = [str(flag).format(home=home) for flag in flags]
    line = refused(home, tmp_path / "run", *flags, "--resume_from_checkpoint", home / run / "checkpoint-4")
    assert f"{run}/checkpoint-4 can't go on with a changed {said.format(home=home)}" in line
    if case not in STARTS:
        return
    commands = {"train_gkd.py": train_gkd.main, "export_model.py": export_model.main}
    for words in map(shlex.split, line.rpartition(": ")[2].split(" && ")):
        assert words[0] == sys.executable
        monkeypatch.setattr(sys, "argv", words[1:])
        commands[Path(words[1]).name](words[2:])
    new = tmp_path / "run-from-4"
    assert json.loads((new / "trainer_state.json").read_text())["global_step"] == 6
    name = {"seed": "model", "student": "model"}.get(case, "adapter_model")
    assert (new / f"{name}.safetensors").is_file()
    if case != "student":  # over the same rows, it starts where the old one was and not where that had begun
        old, begun = (sum(log["dataset/forward_kl"] for log in logs(out).values()) for out in (home / run, new))
        assert begun < 0.95 * old


@pytest.mark.parametrize("what", ["teacher", "rows"])
def test_other_content_at_the_same_path_is_noticed(home, tmp_path, what):
    copy = tmp_path / "home"
    shutil.copytree(home, copy)  # a moved run, its models and rows, which are allowed
    if what == "teacher":
        shutil.copy(copy / "other/model.safetensors", copy / "teacher/model.safetensors")
    else:
        (copy / "rows.json").write_text(json.dumps([*ROWS * 2, *ROWS[:3], ROWS[0]]))
    line = refused(copy, tmp_path / "run", "--resume_from_checkpoint", copy / "full/checkpoint-4")
    assert f"a changed {'data' if what == 'rows' else what}: " in line


@pytest.mark.parametrize("change", ["moved", "other micro-batch", "record of an older gkd", "no record"])
def test_what_is_no_change_of_the_run_is_allowed(home, tmp_path, capsys, change):
    copy, flags = tmp_path / "home", []
    shutil.copytree(home, copy)
    path = copy / "full/run.json"
    record = json.loads(path.read_text())
    if change == "other micro-batch":
        flags = ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2, "--auto_micro_batch", "True"]
    if change == "record of an older gkd":
        path.write_text(json.dumps({key: record[key] for key in record if key not in ("history", "fingerprints")}))
    if change == "no record":
        path.unlink()
    train(copy, tmp_path / "run", *flags, "--resume_from_checkpoint", copy / "full/checkpoint-4")
    out = capsys.readouterr().out
    moved = f"teacher_model_name_or_path {home}/teacher -> {copy}/teacher from step 4 (moved, the same content)"
    assert (moved in out) == (change in ("moved", "other micro-batch"))
    assert ("per_device_train_batch_size 2 -> 1 from step 4" in out) == (change == "other micro-batch")
    assert ("what this command line changes is not known" in out) == (change == "no record")
    assert json.loads((tmp_path / "run/trainer_state.json").read_text())["global_step"] == 6


@pytest.mark.parametrize("content", ['{"arguments": {', "", "[]", "[" * 100_000])
def test_a_damaged_record_is_named(home, tmp_path, content):
    shutil.copytree(home / "full", tmp_path / "full")
    (tmp_path / "full/run.json").write_text(content)
    line = refused(home, tmp_path / "full", "--resume_from_checkpoint", "auto")
    assert f"{tmp_path}/full/run.json is damaged: " in line


def test_a_record_is_data_only(home, tmp_path, capsys):
    shutil.copytree(home / "full", tmp_path / "full")
    record = json.loads((tmp_path / "full/run.json").read_text())
    record["history"] = [
        {"step": 0, "arguments": record["arguments"]},
        3,
        {"step": 1, "changed": {"beta": [1, "\x1b]0;x"]}},
    ]
    record["hardware"] = record["fingerprints"] = "none"
    (tmp_path / "full/run.json").write_text(json.dumps(record))
    train(home, tmp_path / "full", "--resume_from_checkpoint", tmp_path / "full/checkpoint-4")
    out = capsys.readouterr().out
    assert "beta '\\x1b]0;x' -> 0.5 from step 4" in out
    assert "\x1b" not in out
