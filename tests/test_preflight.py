"""What a run shows before weights load, and its memory estimate beside peaks measured on an H100."""

import json
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO
from rich.console import Console
from tiny import make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

import train_gkd
from gkd.collator import RowEncoder
from gkd.losses import distillation_loss
from gkd.memory import GIB, ModelSize, Shape, advice, divergence_copies, estimate
from gkd.preflight import rendered

sys.path.insert(0, str(REPO / "benchmarks"))
import random_pair


class LivePeak(TorchDispatchMode):
    """Peak bytes of the tensors that operations made while it was on."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(key)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return out

    def _freed(self, key, size):
        self.seen.discard(key)
        self.live -= size


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kd_ratio", [1.0, 0.1])
def test_divergence_copies_are_what_the_loss_holds(beta, kd_ratio):
    n, vocabulary, width = 128, 4000, 16
    hidden = torch.randn(n, width, dtype=torch.bfloat16, requires_grad=True)
    head, labels = torch.randn(vocabulary, width, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.long)

    def project(states):
        return states @ head.T

    with LivePeak() as memory:
        loss, _ = distillation_loss(
            hidden, hidden.detach(), labels, project, project, vocabulary, beta, kd_ratio=kd_ratio
        )
        loss.backward()
    assert memory.peak / (n * vocabulary * 4) == pytest.approx(divergence_copies(beta, kd_ratio), abs=0.15)


def settings(bits4=False, zero2=False, **changes):
    student_args = SimpleNamespace(load_in_4bit=bits4, load_in_8bit=False, dtype="auto", use_peft=True)
    plugin = SimpleNamespace(
        zero_stage=2,
        offload_optimizer_device="none",
        hf_ds_config=SimpleNamespace(config=json.loads((REPO / "ds_configs/zero2.json").read_text())),
    )
    args = {"teacher_load_in_4bit": bits4, "teacher_load_in_8bit": False, "teacher_dtype": "auto", "bf16": True}
    args |= {"fp16": False, "gradient_checkpointing": True, "beta": 0.5, "kd_ratio": 1.0, "lmbda": 0.5, "seq_kd": True}
    args |= {"gradient_accumulation_steps": 2, "generation_batch_size": 64}
    args["deepspeed_plugin"] = plugin if zero2 else None
    return student_args, SimpleNamespace(**(args | changes))


def sizes():
    student, teacher = (
        LlamaConfig(**random_pair.BASE, **random_pair.SHAPES[n], dtype="bfloat16") for n in ("1b", "8b")
    )
    return ModelSize.of(student, 8), ModelSize.of(teacher)


# Peaks of torch.cuda.max_memory_allocated on H100 80GB (torch 2.11, transformers 5.17), shapes of Llama 1B and 8B, LoRA
# of rank 8, data/prompts_train.json with one token a byte (224 at most) and 128 new tokens.
@pytest.mark.parametrize(
    ("measured", "ranks", "batch", "changes"),
    [
        (19.87, 1, 3, {"zero2": True}),
        (19.84, 2, 3, {"zero2": True}),
        (8.4, 1, 2, {"bits4": True, "gradient_accumulation_steps": 4}),
    ],
    ids=["ZeRO-2, one GPU", "ZeRO-2, two GPUs", "both in 4 bit"],
)
def test_estimate_is_near_the_measured_peak(measured, ranks, batch, changes):
    found = estimate(*sizes(), *settings(**changes), Shape(batch, 224 + 128, 128), ranks)
    print(f"estimated {found.peak / GIB:.2f} GiB, measured {measured}")
    assert found.peak / GIB == pytest.approx(measured, rel=0.15)


def test_sizes_and_advice():
    student, teacher = sizes()
    assert student.parameters == 1_235_814_400  # as published for Llama-3.2-1B
    assert teacher.parameters == 8_030_261_248  # Llama-3.1-8B
    student_args, args = settings()
    found = estimate(student, teacher, student_args, args, Shape(3, 352, 128), 1)
    assert advice(found, student_args, args).startswith("--teacher_load_in_4bit")
    full = estimate(ModelSize.of(LlamaConfig(**random_pair.BASE, **random_pair.SHAPES["1b"])), teacher, student_args, args, Shape(3, 352, 128), 1)  # fmt: skip
    assert full.resident["gradients and optimizer"] == 3 * 4 * student.parameters
    head = 128256 * 2048 * (4 + 4)
    assert full.phases["activations and divergence"] == found.phases["activations and divergence"] + head


def test_scored_tokens_stand_in_brackets():
    encoder = RowEncoder(make_tokenizer(), 200, 8, "last_turn", [1, 2])
    row = encoder({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]})
    text = rendered(row, encoder.tokenizer).plain
    prompt, answer = text.split("⟦")
    assert "hi" in prompt
    assert "yes" not in prompt
    assert answer.startswith("yes")
    empty = encoder({"prompt": [{"role": "user", "content": "hi"}]})
    assert "no answer: a model writes it" in rendered(empty, encoder.tokenizer).plain


def test_only_shows_and_loads_no_weights(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gkd.models.load_student", lambda *a: pytest.fail("weights were loaded"))
    monkeypatch.setattr(
        "gkd.preflight.Console", lambda **k: Console(file=sys.stdout, width=120)
    )  # the test's own terminal
    flags = ["--model_name_or_path", saved / "student", "--teacher_model_name_or_path", saved / "teacher"]
    flags += ["--dataset_name", REPO / "data/sample_answers.json", "--output_dir", tmp_path / "run"]
    train_gkd.main([*map(str, flags), "--preflight", "only", "--max_length", "150", "--report_to", "none"])
    shown = capsys.readouterr().out
    for text in ("⟦", "Tokens of 4 rows", "an answer ends with", "the same for student and teacher", "peak"):
        assert text in shown
    assert not (tmp_path / "run").exists()
