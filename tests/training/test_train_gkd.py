"""The real command, through `accelerate launch`, on tiny models; and what it says to bad input."""

import json
import shutil
import sys

import pytest
import torch
from commands import ANSWERS, command
from peft import PeftModel
from progress import run as run_command
from tiny import REPO, ROWS, make_model, make_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

import train_gkd

SAMPLE = REPO / "data/sample_translation.json"


def launch(*arguments):
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "ds_configs/cpu.yaml"]
    return run_command([*accelerate, "train_gkd.py", *arguments], cwd=REPO)


# The others run in this process, which has imported what a launched one would import for ten seconds. An adapter is trained by
# the launcher in test_users_command_as_typed.
BY_LAUNCHER = {(1, False, False)}


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("lmbda", "seq_kd"), [(0, False), (0, True), (0.5, False), (0.5, True), (1, False), (1, True)]
)
def test_train_save_load(saved, tmp_path, capsys, lmbda, seq_kd, lora):
    out = tmp_path / "run"
    flags = ["--lmbda", lmbda, "--beta", 0.5, "--seq_kd", seq_kd, "--max_steps", 3, "--save_steps", 2]
    words = command(saved, ANSWERS, out, *flags, *(["--use_peft", "--lora_r", 4] if lora else []))
    if (lmbda, seq_kd, lora) in BY_LAUNCHER:
        done = launch(*words)
        assert done.returncode == 0, done.stderr[-3000:]
        printed = done.stdout
    else:
        train_gkd.main(words)
        printed = capsys.readouterr().out
    assert "GKD run in" in printed
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    sources = {key.split("/")[0] for entry in state["log_history"] for key in entry if key.endswith("/loss")}
    allowed = {0: {"teacher" if seq_kd else "dataset"}, 1: {"on_policy"}}
    assert sources <= allowed.get(lmbda, {"on_policy", "teacher" if seq_kd else "dataset"})
    assert (out / "report.html").is_file()
    assert (out / "checkpoint-2").is_dir()
    if lora:
        base = AutoModelForCausalLM.from_pretrained(saved / "student")
        student = PeftModel.from_pretrained(base, out).merge_and_unload()
    else:
        student = AutoModelForCausalLM.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(saved / "student")
    ids = torch.arange(20, 30)[None]
    assert not torch.equal(student(ids).logits, before(ids).logits)
    assert AutoTokenizer.from_pretrained(out).chat_template == make_tokenizer().chat_template


def test_users_command_as_typed(saved, tmp_path):
    """Command 2 of the write-up, with paths changed, on the published rows with their empty answers."""
    shutil.copy(SAMPLE, tmp_path / "converted_data.json")
    typed = (
        f"--model_name_or_path {saved}/student --teacher_model_name_or_path {saved}/teacher "
        f"--dataset_name {tmp_path}/converted_data.json --learning_rate 2e-5 --per_device_train_batch_size 3 "
        f"--gradient_accumulation_steps 2 --output_dir {tmp_path}/gkd-model2 --logging_steps 2 --dataset_batch_size 3 "
        "--num_train_epochs 1 --gradient_checkpointing --lmbda 0.5 --beta 0.5 --use_peft --lora_r 8 --lora_alpha 16 "
        "--trust_remote_code --bf16 --save_strategy steps --save_steps 180 --save_total_limit 5 --warmup_steps 0 "
        "--lr_scheduler_type cosine --seq_kd True --torch_dtype auto"
    )
    done = launch(*typed.split())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--torch_dtype is deprecated: use --dtype." in done.stderr
    assert "--dataset_batch_size is deprecated" in done.stderr
    assert (tmp_path / "gkd-model2/adapter_model.safetensors").is_file()
    history = json.loads((tmp_path / "gkd-model2/trainer_state.json").read_text())["log_history"]
    # One step, --logging_steps 2: told all the same.
    assert any(key.endswith("/loss") for entry in history for key in entry)


def test_config_file_and_evaluation(saved, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.json").write_text(json.dumps(ROWS))
    config = tmp_path / "run.yaml"
    config.write_text(
        "lmbda: 0.5\nbeta: 1.0\neval_strategy: steps\neval_steps: 1\nmax_steps: 2\ntorch_dtype: float32\n"
    )
    train_gkd.main([*command(saved, data, tmp_path / "run"), "--config", str(config), "--beta", "0.25"])
    history = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    evaluated = [entry for entry in history if "eval_loss" in entry]
    assert len(evaluated) >= 2
    assert evaluated[0]["eval_loss"] == pytest.approx(evaluated[0]["eval_dataset/loss"])
    assert "torch_dtype is deprecated" in capsys.readouterr().err


def test_student_adapter_goes_on(saved, tmp_path):
    train_gkd.main([*command(saved, ANSWERS, tmp_path / "first"), "--lmbda", "0", "--max_steps", "1", "--use_peft"])
    adapter = str(tmp_path / "first")
    train_gkd.main(
        [
            *command(saved, ANSWERS, tmp_path / "second"),
            "--lmbda",
            "0",
            "--max_steps",
            "1",
            "--student_adapter",
            adapter,
        ]
    )
    assert (tmp_path / "second/adapter_model.safetensors").is_file()


def test_teacher_adapter_is_merged(saved, tmp_path):
    from gkd.config.training import GKDArguments
    from gkd.models.loading import load_teacher

    train_gkd.main([*command(saved, ANSWERS, tmp_path / "t"), "--lmbda", "0", "--max_steps", "2", "--use_peft"])
    args = GKDArguments(
        output_dir=str(tmp_path),
        teacher_model_name_or_path=str(saved / "student"),
        teacher_adapter=str(tmp_path / "t"),
    )
    plain = AutoModelForCausalLM.from_pretrained(saved / "student")
    adapted, ids = load_teacher(args), torch.arange(20, 30)[None]
    expected = PeftModel.from_pretrained(plain, tmp_path / "t")(ids).logits
    torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in adapted.parameters())


BAD = {
    "missing file": (["--dataset_name", "nowhere.json"], "nowhere.json: no such file or folder"),
    "broken JSON": (["--dataset_name", "{tmp}/broken.json"], "broken.json, line 2, column 1: broken JSON"),
    "no messages": (["--dataset_name", "{tmp}/text.json"], "text.json, row 0: neither `messages` nor `prompt`"),
    "empty answers": (["--lmbda", "0.5", "--dataset_name", "{tmp}/empty.json"], "2 of 2 rows have no answer"),
    "other tokenizer": (["--teacher_model_name_or_path", "{tmp}/other"], "id 262 is None for the student"),
    "λ": (["--lmbda", "1.5"], "--lmbda must lie in [0, 1], not 1.5."),
    "no room": (["--lmbda", "0.5", "--max_new_tokens", "200"], "leaves no room for a prompt"),
    "no room in an evaluation": (
        ["--max_new_tokens", "200", "--lmbda", "0", "--eval_dataset_name", str(ANSWERS)],
        "leaves no room for a prompt",
    ),
    "encoder-decoder": (["--teacher_model_name_or_path", "{tmp}/t5"], "t5: t5 is an encoder-decoder; gkd trains"),
    "llama 4": (["--teacher_model_name_or_path", "{tmp}/llama4"], "llama4: llama4 (a text model inside"),
    "mllama": (["--teacher_model_name_or_path", "{tmp}/mllama"], "mllama: mllama (a text model inside"),
    "no experts": (["--router_aux_loss_coef", "0.1"], "llama is no mixture of experts"),
    "no bitsandbytes": (["--load_in_4bit", "--use_peft"], "needs bitsandbytes, which is not installed"),
    "no steps a generation": (["--steps_per_generation", "0"], "--steps_per_generation must be positive"),
    "unknown backend": (["--generation_backend", "vlm"], "invalid choice: 'vlm'"),
    "no vllm": (["--generation_backend", "vllm"], "--generation_backend vllm needs vllm, which is not installed"),
    "teacher without bitsandbytes": (["--teacher_load_in_8bit"], "--teacher_load_in_8bit needs bitsandbytes"),
    "other run": (["--output_dir", "{tmp}/run"], "already holds a run (checkpoint-1). Go on with it by"),
    "typo": (["--lmbd", "0.5"], "unknown flag --lmbd. Did you mean --lmbda?"),
    "no effect": (["--packing", "True"], "--packing does not apply to GKD"),
    "config typo": (["--config", "{tmp}/typo.yaml"], "unknown flag --lamda"),
    "no such student": (
        ["--model_name_or_path", "nowhere/student"],
        "--model_name_or_path nowhere/student: its tokenizer",
    ),
    "no such teacher": (["--teacher_model_name_or_path", "nowhere/teacher"], "nowhere/teacher: no model there"),
}


@pytest.mark.parametrize(("flags", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(saved, tmp_path, capsys, monkeypatch, flags, message):
    (tmp_path / "broken.json").write_text('[{"prompt": "a"},\n')
    (tmp_path / "text.json").write_text('[{"text": "a"}]')
    (tmp_path / "empty.json").write_text(json.dumps([{**ROWS[0], "messages": [ROWS[0]["messages"][0]]}] * 2))
    (tmp_path / "typo.yaml").write_text("lamda: 0.5\n")
    (tmp_path / "run/checkpoint-1").mkdir(parents=True)
    for kind in ("t5", "llama4", "mllama"):
        CONFIG_MAPPING[kind]().save_pretrained(tmp_path / kind)
    make_model(1).save_pretrained(tmp_path / "other")
    make_tokenizer(extra=("extra",)).save_pretrained(tmp_path / "other")
    monkeypatch.setattr("gkd.models.loading.load_student", lambda *a: pytest.fail("a model was loaded"))
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    base = command(saved, ANSWERS, tmp_path / "out", "--lmbda", "0")
    with pytest.raises(SystemExit) as stop:
        train_gkd.main([*base, *(flag.format(tmp=tmp_path) for flag in flags)])
    said = f"{stop.value} {capsys.readouterr().err}"
    print(said)
    assert stop.value.code != 0
    assert message in said


def test_help_is_grouped(capsys):
    with pytest.raises(SystemExit):
        train_gkd.main(["--help"])
    text = capsys.readouterr().out
    for group in ("data:", "student:", "teacher:", "distillation:", "generation:", "training:"):
        assert f"\n{group}\n" in text
    assert text.index("  --lmbda X") > text.index("\ndistillation:")
    assert "--adam_beta1" not in text


def test_streaming(saved, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--lmbda", "0.5", "--seq_kd", "True", "--dataset_streaming", "True", "--max_steps", "2"]
    train_gkd.main([*command(saved, data, tmp_path / "run"), *flags, "--report_to", "none"])
    assert (tmp_path / "run/model.safetensors").is_file()


def test_a_template_that_is_named_is_trained_and_saved(saved, tmp_path, capsys):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}ZZ{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}ZZassistant: {% endif %}"
    )
    flags = ["--chat_template_path", str(template), "--lmbda", "0", "--max_steps", "1"]
    train_gkd.main([*command(saved, ANSWERS, tmp_path / "run"), *flags])
    assert "ZZassistant: ⟦" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == template.read_text()


def test_template_variables_stay_with_the_saved_tokenizer(saved, tmp_path):
    template = tmp_path / "t.jinja"
    thinking = "{% if thinking is not defined or thinking %}<think>{% endif %}"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}" + thinking)
    flags = ["--chat_template_path", str(template), "--chat_template_kwargs", '{"thinking": false}', "--lmbda", "1"]
    train_gkd.main([*command(saved, ANSWERS, tmp_path / "run"), *flags, "--max_steps", "1"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    message = [{"role": "user", "content": "hi"}]
    assert "<think>" not in tokenizer.apply_chat_template(message, tokenize=False)
    assert "<think>" in tokenizer.apply_chat_template(message, tokenize=False, thinking=True)


def test_config_file_in_every_form(saved, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("preflight: off\neval_strategy: no\nmax_steps: 1\nlmbda: 0\n")
    train_gkd.main([*command(saved, ANSWERS, tmp_path / "run"), f"--config={config}"])
    assert "preflight" not in capsys.readouterr().out
    assert json.loads((tmp_path / "run/trainer_state.json").read_text())["global_step"] == 1
    config.write_text("train_on: all_turn\n")
    with pytest.raises(SystemExit):
        train_gkd.main([*command(saved, ANSWERS, tmp_path / "run2"), f"--config={config}"])
    assert "train_on must be one of last_turn, all_turns, not 'all_turn'" in capsys.readouterr().err


def test_torch_compile_with_lora(tmp_path):
    """On its own text, whose length is another in each pass: a layer and few tokens, since each pass is traced anew."""
    for seed, name in enumerate(("student", "teacher")):
        make_model(seed, num_hidden_layers=1).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    flags = "--lmbda 1 --use_peft --max_steps 1 --max_new_tokens 2 --torch_compile True --torch_compile_backend eager"
    train_gkd.main([*command(tmp_path, ANSWERS, tmp_path / "run"), *flags.split()])
    assert (tmp_path / "run/adapter_model.safetensors").is_file()
