"""Command lines that nobody thought of: each command, in process, on tiny models, with one to four odd flags.

Each command line works, or is refused in one line before weights load. The lines are the same on each run.
GKD_FUZZ_SHARD selects one of eight parts, such as `3`, or `all`.
"""

import io
import json
import os
import shutil
import signal
import sys
from argparse import ArgumentParser
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tiny import ROWS, make_model, save_pair
from transformers import PreTrainedModel

import cache_teacher
import convert_data
import eval_gkd
import export_model
import gkd.cli.chat
import gkd.cli.report
import gkd.cli.shrink
import train_gkd
from gkd.runs import folder as run_folder

SHARDS = 8
CHOSEN = os.environ.get("GKD_FUZZ_SHARD", "1")
# Command lines of a shard, by command.
LINES = {"train": 28, "eval": 9, "cache": 7, "convert": 8, "export": 5, "report": 3, "shrink": 3, "chat": 3}
MAIN = {
    "train": train_gkd.main,
    "eval": eval_gkd.main,
    "cache": cache_teacher.main,
    "convert": convert_data.main,
    "export": export_model.main,
    "report": gkd.cli.report.main,
    "shrink": gkd.cli.shrink.main,
    "chat": gkd.cli.chat.main,
}
BASE = {
    "train": "--model_name_or_path {m}/student --teacher_model_name_or_path {m}/teacher --dataset_name {m}/rows.json "
    "--output_dir {out} --max_new_tokens 4 --max_length 64 --max_steps 1 --lmbda 0.5 --report_to none",
    "eval": "{m}/run --dataset_name {m}/rows.json --output_dir {out} --max_new_tokens 4",
    "cache": "--model_name_or_path {m}/student --teacher_model_name_or_path {m}/teacher --dataset_name {m}/rows.json "
    "--output_dir {out} --max_new_tokens 4 --max_length 64",
    "convert": "{m}/rows.json -o {out}.json",
    "export": "{m}/run -o {out}",
    "report": "{m}/run -o {out}",
    "shrink": "{m}/teacher -o {out} --layers 1",
    "chat": "--student {m}/student --max_new_tokens 4 --device cpu",
}
NUMBERS = {int: "-1 0 1 2 3".split(), float: "-1 0 0.1 0.5 1 2 nan inf".split()}
TEXTS = ["", "x", "{m}/nothing", "nowhere/x", "{m}/rows.json", "{m}/student", '{{"a": 1}}', "{{", "*", "auto", "0"]
MODELS = (
    "{m}/student {m}/teacher {m}/run {m}/adapter {m}/torn {m}/incomplete {m}/no_tokenizer {m}/rows.json x/y".split()
)
DATA = "{m}/rows.json {m}/split {m}/empty.json {m}/broken.json {m}/nothing.json x/y".split()
JSON_KWARGS = ["{{}}", '{{"a": 1}}', "[1]", "{{", "x", '{{"attn_implementation": "eager"}}', '{{"dtype": "float99"}}']
METRIC_NAMES = "loss eval_loss eval_los dataset/forward_kl on_policy/reverse_kl score/rouge eval_score/bleu x".split()
# Values of flags that accept only a few, without values that are slow or need a network.
VALUES = {
    "config": ["{m}/good.yaml", "{m}/typo.yaml", "{m}/broken.yaml", "{m}/null.yaml", "{m}/nothing.yaml"],
    "output_dir": ["{out}", "{m}/rows.json", "{m}/rows.json/x", "{m}/split/run", "{m}/run"],
    "output": ["{out}.jsonl", "{out}.parquet", "{out}.txt", "{m}/rows.json", "{m}/nothing/x.json"],
    "run": ["{m}/run", "{m}/student", "{m}/nothing"],
    "max_steps": ["0", "1", "2", "-1", "x"],
    "num_train_epochs": ["0", "-1", "0.5", "1", "nan", "x"],
    "max_new_tokens": ["-1", "0", "1", "4", "64", "x"],
    "max_length": ["-1", "0", "1", "8", "64", "100000", "None"],
    "layers": ["-1", "0", "1", "2", "x"],
    "metric_for_best_model": METRIC_NAMES,
    "lora_target_modules": ["q_proj", "qproj", "all-linear", "lm_head", ".*_proj", "[", "model.layers.0.mlp.up_proj"],
    "lora_target_parameters": ["model.layers.0.mlp.up_proj.weight", "x"],
    "lora_modules_to_save": ["lm_head", "embed_tokens", "x"],
    "lora_r": ["-1", "0", "1", "4", "x"],
    "lora_task_type": ["CAUSAL_LM", "SEQ_CLS", "x"],
    "report_to": ["none", "tensorboard", "wandb", "mlflow", "all", "x"],
    "dataset_num_proc": ["-1", "0", "1", "x"],
    "dataloader_num_workers": ["-1", "0", "1"],
    "teacher_device": ["cpu", "cuda:0", "auto", "meta", "x"],
    "device": ["cpu", "cuda:0", "auto", "meta", "x"],
    "torch_compile_backend": ["eager", "x"],
    "resume_from_checkpoint": ["auto", "True", "false", "{m}/run/checkpoint-1", "{m}/nothing"],
    "attn_implementation": ["eager", "sdpa", "flash_attention_2", "x/y", "x"],
    "optim_args": ["a=1", "x", "weight_decay=0.1", "betas=1"],
    "metrics": ["exact_match", "rouge", "bleu", "x"],
    "scorer": ["json:dumps", "json:nothing", "nothing:x", "x", "builtins:len"],
    "teacher_cache": ["{m}/cache", "{m}/nothing", "{m}/run"],
    "mix": ["{m}/rows.json:1", "{m}/rows.json", "x:1", "{m}/rows.json:0"],
    "tokenizer": MODELS,
    "models": MODELS,
    "student": MODELS,
    "teacher": MODELS,
    "model_name_or_path": MODELS,
    "teacher_model_name_or_path": [*MODELS, "self"],
    "teacher_adapter": MODELS,
    "student_adapter": MODELS,
    "dataset_name": DATA,
    "eval_dataset_name": DATA,
    "plot": ["{out}.png", "{out}.xyz", "{m}/nothing/x.png"],
    **dict.fromkeys(
        ("model_init_kwargs", "teacher_model_init_kwargs", "chat_template_kwargs", "lr_scheduler_kwargs"), JSON_KWARGS
    ),
}
# Flags that compile with inductor, contact another machine, or print help.
LEFT_OUT = {"help", "help_all", "torch_compile", "torch_compile_mode", "ddp_backend", "local_rank"}


class _Parser(Exception):
    pass


def flags_of(command: str) -> list:
    """The optional flags of a command, as argparse knows them."""

    def stop(parser, *args, **kwargs):
        raise _Parser(parser)

    with patch.object(ArgumentParser, "parse_known_args", stop), pytest.raises(_Parser) as stopped:
        MAIN[command](BASE[command].split())
    actions = stopped.value.args[0]._actions
    return [a for a in actions if a.option_strings and a.dest not in LEFT_OUT and a.const is not False]


@st.composite
def command_lines(draw, command: str, flags: list) -> list[str]:
    """The command's words; `{m}` and `{out}` stand for folders."""
    words = BASE[command].split()
    for action in draw(st.lists(st.sampled_from(flags), min_size=1, max_size=4, unique=True)):
        words.append(action.option_strings[0])
        if action.nargs == 0:
            continue
        if action.dest in VALUES:
            values = VALUES[action.dest]
        elif action.choices:
            values = [*map(str, action.choices)]
        elif action.metavar == "True|False":
            values = ["True", "False"]
        else:
            values = NUMBERS.get(action.type, TEXTS)
        many = action.nargs in ("+", "*")
        words += draw(st.lists(st.sampled_from(values), min_size=1, max_size=2 if many else 1, unique=True))
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Models, good and bad, data, a run and a cache."""
    folder = tmp_path_factory.mktemp("fuzz")
    save_pair(folder, tokenizer)
    make_model(seed=1, hidden_size=48).save_pretrained(folder / "no_tokenizer")
    for name in ("torn", "incomplete"):
        shutil.copytree(folder / "student", folder / name)
    weights = folder / "torn/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    model = make_model()
    part = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(folder / "incomplete", state_dict=part)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "empty.json").write_text("[]")
    (folder / "broken.json").write_text('[{"prompt": 1},')
    (folder / "split").mkdir()
    for split in ("train", "test"):
        (folder / f"split/{split}.json").write_text(json.dumps(ROWS))
    (folder / "good.yaml").write_text("beta: 0.25\nlogging_steps: 1\n")
    (folder / "typo.yaml").write_text("bta: 0.25\n")
    (folder / "broken.yaml").write_text("beta: [\n")
    (folder / "null.yaml").write_text("beta: null\n")
    data = ["--eval_dataset_name", f"{folder}/rows.json", "--save_steps", "1"]
    for name, more in (("run", data), ("adapter", ["--use_peft", "--save_strategy", "no"])):
        with quiet():
            train_gkd.main([*filled("train", folder, folder / name), *more])
    with quiet():
        cache_teacher.main(filled("cache", folder, folder / "cache"))
    return folder


def filled(command: str | list[str], folder: Path, out: Path) -> list[str]:
    words = BASE[command].split() if isinstance(command, str) else command
    return [word.format(m=folder, out=out) for word in words]


@contextmanager
def quiet():
    """Captures both streams of a command, and restores the state of the process after it."""
    environment, where = dict(os.environ), Path.cwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "stdin", io.StringIO("hi\n")):
            yield out, err
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(where)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for lock in run_folder._HELD.values():
            lock.release(force=True)
        run_folder._HELD.clear()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        torch.use_deterministic_algorithms(False)
        datasets.enable_progress_bars()


def problem_of(command: str, argv: list[str], out: Path) -> str | None:
    """The fault in how a command handled its command line, or None."""
    loaded = []
    real = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, name, *args, **kwargs):
        loaded.extend(filter(None, [name]))
        return real(cls, name, *args, **kwargs)

    with quiet() as (_, err), patch.object(PreTrainedModel, "from_pretrained", classmethod(from_pretrained)):
        try:
            MAIN[command](argv)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            return f"{type(error).__name__}: {str(error)[:300]}" + (" (weights had loaded)" if loaded else "")
    if code in (0, None):
        state = out / "trainer_state.json"
        if command == "train" and state.is_file() and not json.loads(state.read_text())["global_step"]:
            return "success without a step"
        return "a traceback was printed" if "Traceback" in err.getvalue() else None
    said = code if isinstance(code, str) else err.getvalue().rpartition("error: ")[2]
    said = said.strip() or err.getvalue().strip().rpartition("\n")[2]
    if "\n" in said or len(said.split()) < 3:
        return f"not a sentence in a line: {said[:400]!r}"
    return f"after weights had loaded: {said}" if loaded else None


@pytest.mark.parametrize("shard", range(1, SHARDS + 1) if CHOSEN == "all" else [int(CHOSEN)])
@pytest.mark.parametrize("command", LINES)
def test_any_flags(command, shard, folder, tmp_path, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "")
    flags, problems, count = flags_of(command), [], 0

    @seed(shard)
    @settings(
        max_examples=LINES[command],
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(words=command_lines(command, flags))
    def run(words):
        nonlocal count
        count += 1
        out = tmp_path / f"out{count}"
        if problem := problem_of(command, filled(words, folder, out), out):
            base = len(BASE[command].split())
            problems.append(f"{' '.join(words[base:])}\n    {problem}")

    with pictures() if command == "report" else nullcontext():
        run()
    if report := os.environ.get("GKD_FUZZ_REPORT"):
        with open(report, "a") as file:
            file.write("".join(f"{command} {shard} {p}\n" for p in problems) + f"{command} {shard}: {count} lines\n")
    assert not problems, f"{len(problems)} of {count} command lines:\n" + "\n".join(problems)
