"""Code that comes with a model, or in its weights, runs only if asked."""

import json
import shutil

import pytest
import torch
from commands import ANSWERS
from hostile import FAST, Runs, command, refusal
from peft import LoraConfig, get_peft_model
from tiny import make_model

import eval_gkd
import export_model
import train_gkd
from gkd.cli import chat


@pytest.fixture
def bring_code(saved, tmp_path, monkeypatch):
    """A function that lets the student's or teacher's folder bring code, which makes a folder `ran` when it is imported."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def bring(role):
        folder = tmp_path / f"{tmp_path.name}_{role}"  # transformers keeps modules by the folder's name
        shutil.copytree(saved / role, folder)
        (folder / "theirs.py").write_text(
            f"import os\nos.makedirs({str(tmp_path / 'ran')!r}, exist_ok=True)\n"
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class TheirConfig(LlamaConfig):\n    model_type = 'theirs'\n"
            "class Theirs(LlamaForCausalLM):\n    config_class = TheirConfig\n"
        )
        path = folder / "config.json"
        config = json.loads(path.read_text()) | {"model_type": "theirs", "architectures": ["Theirs"]}
        config["auto_map"] = {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.Theirs"}
        path.write_text(json.dumps(config))
        return folder

    return bring


def stop(*args):
    raise SystemExit("it went on")


FLAGS = {"student": "--trust_remote_code", "teacher": "--teacher_trust_remote_code"}


@pytest.mark.parametrize("role", FLAGS)
@pytest.mark.parametrize("program", ["train_gkd", "eval_gkd", "chat"])
def test_the_code_of_a_model_runs_only_if_its_own_flag_asks(saved, tmp_path, bring_code, monkeypatch, program, role):
    models = {"student": saved / "student", "teacher": saved / "teacher"} | {role: bring_code(role)}
    pair = [models["student"], "--teacher_model_name_or_path", models["teacher"], "--dataset_name", ANSWERS]
    call, words = {
        "train_gkd": (train_gkd.main, ["--model_name_or_path", *pair, "--output_dir", tmp_path / "out", *FAST]),
        "eval_gkd": (eval_gkd.main, ["--models", *pair, "--output_dir", tmp_path / "out"]),
        "chat": (chat.main, ["--student", models["student"], "--teacher", models["teacher"]]),
    }[program]
    words = [str(word) for word in words]
    monkeypatch.setattr("gkd.models.loading.load_student", stop)
    monkeypatch.setattr("gkd.models.loading.load_teacher", stop)
    monkeypatch.setattr("gkd.cli.chat.read_prompts", stop)  # after its models have loaded
    other = next(flag for of, flag in FLAGS.items() if of != role)
    for more in ([], [other]):
        said = refusal(call, [*words, *more])
        assert str(models[role]) in said
        assert "custom code" in said
        assert not (tmp_path / "ran").exists()
    assert refusal(call, [*words, FLAGS[role]]) == "it went on"
    assert (tmp_path / "ran").is_dir()


def test_export_runs_the_code_of_a_student_only_if_asked(bring_code, tmp_path):
    words = [str(bring_code("student")), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert "trust_remote_code" in refusal(export_model.main, words)
    assert not (tmp_path / "ran").exists()
    export_model.main([*words, "--trust_remote_code"])
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("part", ["student", "teacher", "student_adapter"])
def test_code_in_pickled_weights_does_not_run(saved, tmp_path, part):
    trap = tmp_path / "ran"
    for name in ("student", "teacher"):
        shutil.copytree(saved / name, tmp_path / name)
    folder, name = tmp_path / part, "pytorch_model.bin"
    if part == "student_adapter":
        folder.mkdir()
        adapter = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        adapter["base_model_name_or_path"] = str(tmp_path / "student")
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
        name = "adapter_model.bin"
    else:
        (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Runs(trap)}, folder / name)
    more = ["--student_adapter", folder] if part == "student_adapter" else []
    told = [refusal(train_gkd.main, command(tmp_path, tmp_path / "out", *more))]
    both = ["--teacher_model_name_or_path", str(tmp_path / "teacher"), "--dataset_name", str(ANSWERS)]
    student = folder if more else tmp_path / "student"
    told.append(refusal(eval_gkd.main, ["--models", str(student), *both, "--output_dir", str(tmp_path / "e")]))
    told.append(refusal(chat.main, ["--student", str(folder)]))
    for said in told:
        assert f"{folder / name} is refused: it names" in said
    assert not trap.exists()


def test_code_in_the_weights_of_an_adapters_base_does_not_run(saved, tmp_path):
    trap = tmp_path / "ran"
    shutil.copytree(saved / "student", tmp_path / "base")
    get_peft_model(make_model(), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    path.write_text(json.dumps(config))
    (tmp_path / "base/model.safetensors").unlink()
    torch.save({"model.norm.weight": Runs(trap)}, tmp_path / "base/pytorch_model.bin")
    adapter = str(tmp_path / "adapter")
    for call, words in (
        (export_model.main, [adapter, "-o", str(tmp_path / "exported"), "--device", "cpu"]),
        (chat.main, ["--student", adapter]),
    ):
        assert "base/pytorch_model.bin is refused: it names" in refusal(call, words)
    assert not trap.exists()


def test_good_pickled_weights_are_taken(saved, tmp_path):
    shutil.copytree(saved / "student", tmp_path / "student")
    (tmp_path / "student/model.safetensors").unlink()
    torch.save(make_model(seed=0).state_dict(), tmp_path / "student/pytorch_model.bin")
    shutil.copytree(saved / "teacher", tmp_path / "teacher")
    train_gkd.main(command(tmp_path, tmp_path / "out", "--max_steps", "1", "--save_strategy", "no"))
    assert (tmp_path / "out/model.safetensors").is_file()
