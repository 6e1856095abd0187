"""Tokens stay out of what is shown, kept and published."""

import json
import pickle

import pytest
from hostile import command, refusal
from tiny import ROWS

import eval_gkd
import export_model
import train_gkd
from gkd.config.training import GKDArguments
from gkd.io.secrets import is_secret, public, without_secrets


def test_secrets_are_known_by_name():
    for name in ("--hub_token", "--hub-token", "token", "HF_TOKEN", "api_key", "aws_secret", "db_password"):
        assert is_secret(name), name
    for name in ("--eos_token", "pad_token", "max_new_tokens", "tokenizer", "output_dir", "push_to_hub"):
        assert not is_secret(name), name
    assert public({"a": [{"token": 1, "b": (2,)}], "hub_token": 3}) == {"a": [{"b": (2,)}]}


def test_a_command_line_is_shown_without_secrets():
    words = ["train_gkd.py", "--hub_token", "S1", "--eos_token", "</s>", "--hub-token=S2", "--lmbda", "0.5"]
    words += ["--model_init_kwargs", '{"token": "S3", "dtype": "auto"}', '--teacher_model_init_kwargs={"token":"S4"}']
    words += ["--chat_template_kwargs", '{"a":  1}', "--model_init_kwargs", '{"token": "S5"']
    shown = without_secrets(words)
    assert not any(f"S{n}" in word for n in range(1, 6) for word in shown)
    assert len(shown) == len(words)
    assert [a for a, b in zip(words, shown, strict=True) if a == b] == [
        *("train_gkd.py", "--hub_token", "--eos_token", "</s>", "--lmbda", "0.5", "--model_init_kwargs"),
        *("--chat_template_kwargs", '{"a":  1}', "--model_init_kwargs"),
    ]


def test_arguments_keep_their_secrets_to_themselves(tmp_path):
    args = GKDArguments(output_dir=str(tmp_path), hub_token="hf_SECRET", model_init_kwargs={"token": "hf_SECRET"})
    assert args.hub_token == args.model_init_kwargs["token"] == "hf_SECRET"
    for text in (repr(args), str(args), args.to_json_string(), str(args.to_sanitized_dict())):
        assert "hf_SECRET" not in text
    assert b"hf_SECRET" not in pickle.dumps(args)
    assert pickle.loads(pickle.dumps(args)).beta == args.beta


def test_nothing_that_a_run_leaves_holds_a_secret(saved, tmp_path, capfd):
    out = tmp_path / "run"
    held_out = tmp_path / "rows.json"
    held_out.write_text(json.dumps(ROWS[:2]))
    kwargs = '{"token": "hf_SECRET"}'
    flags = ["--hub_token", "hf_SECRET", "--model_init_kwargs", kwargs, "--teacher_model_init_kwargs", kwargs]
    flags += ["--report_to", "tensorboard", "--max_steps", "1", "--save_steps", "1", "--use_peft", "--lora_r", "4"]
    train_gkd.main(command(saved, out, *flags, "--eval_dataset_name", held_out))
    eval_gkd.main([str(out), "--teacher_model_init_kwargs", kwargs, "--checkpoints"])
    export_model.main([str(out), "-o", str(tmp_path / "exported"), "--device", "cpu"])
    files = [path for folder in (out, tmp_path / "exported") for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"training_args.bin", "run.json", "report.html", "README.md", "adapter_config.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    for path in files:
        assert b"hf_SECRET" not in path.read_bytes(), path
    assert "hf_SECRET" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "flags",
    [
        ["--hub_tokn", "hf_SECRET"],
        ["--model_init_kwargs", '{"token": "hf_SECRET"'],
        ["--hub_token", "hf_SECRET", "--lmbda", "2"],
    ],
)
def test_a_refused_command_line_does_not_repeat_secrets(saved, tmp_path, capfd, flags):
    refusal(train_gkd.main, command(saved, tmp_path / "out", *flags))
    refusal(eval_gkd.main, ["--models", "m", "--output_dir", "o", *flags])
    said = "".join(capfd.readouterr())
    assert "error:" in said
    assert "hf_SECRET" not in said
