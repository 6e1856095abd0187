"""`--generation_backend vllm` with SmolLM2-135M-Instruct in fp32, which tests/vllm_cpu.sh fetches: greedy text is transformers'
before and after training, and a run in which both models write goes on from a checkpoint."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from prompts import config
from tiny import REPO
from trainers import losses, tiny_trainer, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import cache_teacher
from gkd.generation import vllm
from gkd.generation.generator import CompletionGenerator, complete
from gkd.models.shrink import shrink
from gkd.teachers.cache import TeacherCache

FOLDER = os.environ.get("GKD_SMOLLM2", "")
pytestmark = pytest.mark.skipif(
    not (FOLDER and importlib.util.find_spec("vllm")), reason="needs vllm and SmolLM2: tests/vllm_cpu.sh"
)
ROWS, MORE = (
    json.loads(Path(REPO, "data/prompts_heldout.json").read_text(encoding="utf-8"))[i : i + 8] for i in (0, 8)
)
ON_VLLM = ("--backend", "vllm")


def make_smollm2():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def make_trainer(folder, tokenizer, student, **flags):
    """On prompts alone: both models write all text."""
    flags = {"generation_backend": "vllm", "seq_kd": True, "max_new_tokens": 16, "max_length": 160} | flags
    more = {"processing_class": tokenizer, "peft_config": flags.pop("peft_config", None)}
    return tiny_trainer(folder / "run", student, make_smollm2(), ROWS, more=more, **flags)


def assert_same_text(trainer, model, tokenizer):
    """Greedy, 64 tokens behind each prompt; returns them as lists."""
    texts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False) for row in ROWS]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    settings = config(max_new_tokens=64, eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id)
    both = [
        complete(model, Accelerator(), generator, inputs["input_ids"], inputs["attention_mask"], settings, 1)
        for generator in (trainer.generator, CompletionGenerator("dynamic"))
    ]
    for one, other in zip(*both, strict=True):
        assert one.tolist() == other.tolist()
    return both[0][0].tolist()


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
def test_greedy_text_is_transformers_before_and_after_training(tmp_path, tokenizer, adapter):
    peft = LoraConfig(r=8, target_modules="all-linear") if adapter else None
    options = {"peft_config": peft, "lmbda": 1.0, "max_steps": 10, "learning_rate": 1e-3 if adapter else 1e-4}
    trainer = make_trainer(tmp_path, tokenizer, make_smollm2(), temperature=1.5, **options)
    with torch.no_grad():  # equal models would teach each other nothing
        for name, weight in trainer.teacher.inner.named_parameters():
            if "mlp" in name:
                weight *= 0.8
    before = assert_same_text(trainer, trainer.model, tokenizer)
    trainer.train()
    assert len(losses(trainer)) == 10
    assert assert_same_text(trainer, trainer.model, tokenizer) != before


def test_a_run_in_which_both_write_goes_on(tmp_path, tokenizer):
    """A student of other shape than the teacher, so that each has an engine."""

    def trainer(folder):
        student = shrink(make_smollm2(), range(0, 30, 3))
        flags = {"lmbda": 0.5, "max_steps": 6, "learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 3}
        return make_trainer(tmp_path / folder, tokenizer, student, **flags)

    engines = len(vllm._ENGINES)
    whole = trainer("whole")
    whole.train()
    assert len(vllm._ENGINES) <= engines + 2
    assert {"on_policy/loss", "teacher/loss"} <= {name for log in whole.state.log_history for name in log}
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/run/checkpoint-3"))
    assert resumed.state.global_step == 6
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-3)  # from the same texts
    moved = weights(resumed)
    assert all(torch.isfinite(weight).all() for weight in moved.values())
    for model in (resumed.model, resumed.teacher.inner):
        assert_same_text(resumed, model, tokenizer)


def test_a_cache_is_that_of_our_own_pass(tmp_path, tokenizer, monkeypatch):
    """The 64 likeliest tokens of text that the teacher has sampled: two may change places where they are as likely."""
    monkeypatch.setattr(Accelerator, "end_training", lambda self: None)  # the engines of other tests share its groups

    def cache(name, rows, *flags):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        words = ["--model_name_or_path", FOLDER, "--teacher_model_name_or_path", FOLDER, "--teacher_dtype", "float32"]
        words += ["--dataset_name", tmp_path / f"{name}.json", "--output_dir", tmp_path / name]
        cache_teacher.main([str(word) for word in (*words, *flags)])
        return TeacherCache(tmp_path / name).rows()

    rows, sampled = ROWS + MORE, []
    for row, written in zip(rows, cache("written", rows, "--seq_kd", *ON_VLLM), strict=True):
        answer = tokenizer.decode(written["input_ids"][len(written["prompt_ids"]) :], skip_special_tokens=True)
        sampled.append({"messages": [*row["prompt"], {"role": "assistant", "content": answer}]})
    caches = cache("own", sampled), cache("told", sampled, *ON_VLLM)
    ids, log_probs, tails = (
        [np.concatenate([row[name] for row in rows]) for rows in caches]
        for name in ("topk_ids", "topk_log_probs", "tail_log_mass")
    )
    assert len(tails[0]) > 1000
    assert (ids[0] == ids[1]).mean() > 0.998
    np.testing.assert_allclose(*(values.astype(np.float32) for values in log_probs), rtol=2**-9, atol=1e-4)
    np.testing.assert_allclose(*map(np.exp, tails), rtol=0, atol=1e-4)
