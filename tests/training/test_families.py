"""The gradient of a step through the whole trainer, family by family, against plain forwards of single rows."""

from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from families import DENSE, EXPERTS, make_family
from transformers import TrainerCallback

from gkd.config.training import GKDArguments
from gkd.data.batch import Source
from gkd.losses.divergences import jsd
from gkd.rollout.steps import draw_source
from gkd.training.trainer import GKDTrainer

LENGTHS = [(7, 5), (3, 9), (11, 2), (5, 7)]  # tokens of prompt and answer, in two micro-batches
SEED = next(
    s for s in range(99) if [draw_source(s, n, 0.5, False) for n in (0, 1)] == [Source.DATASET, Source.ON_POLICY]
)


@pytest.fixture(scope="module")
def encoded():
    draw, rows = torch.Generator().manual_seed(3), []
    for prompt, answer in LENGTHS:
        ids = torch.randint(6, 262, (prompt + answer,), generator=draw).tolist()
        labels = [-100] * prompt + ids[prompt:]
        rows.append({"prompt_ids": ids[:prompt], "input_ids": ids, "labels": labels, "prompt_cut": False, "answer_cut": False})  # fmt: skip
    return Dataset.from_list(rows)


class Recorded(GKDTrainer):
    """Keeps the rows and the gradient of each step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows, self.grads, recorder = [[]], [], self

        class Recorder(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
                grads = {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}
                recorder.grads.append(grads)
                recorder.rows.append([])

        self.add_callback(Recorder())

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.rows[-1].append((inputs["input_ids"].clone(), inputs["labels"].clone()))
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.fixture
def record(train, encoded):
    """Two steps of two micro-batches each, recorded."""

    def run(student, teacher, **options):
        steps = {"max_steps": 2, "gradient_accumulation_steps": 2, "lmbda": 0.5, "seed": SEED, "max_grad_norm": 1e9}
        return train(student, teacher, Recorded, encoded, **(steps | options))

    return run


def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def reference(student, teacher, micro_batches, coefficient=0.0):
    """The gradient of the mean divergence, one unpadded row at a time and in evaluation mode.

    `coefficient`: of the balance loss, which transformers computes from a whole padded micro-batch.
    """
    total, tokens, balance = 0.0, 0, 0.0
    for batch in micro_batches:
        if coefficient:
            ends = [int((labels != -100).nonzero().max()) for labels in batch[1]]
            mask = (torch.arange(batch[0].shape[1]) <= torch.tensor(ends)[:, None]).long()
            output = student(input_ids=batch[0], attention_mask=mask, use_cache=False, output_router_logits=True)
            balance = balance + output.aux_loss / len(micro_batches)
        for ids, labels in zip(*batch, strict=True):
            width = int((labels != -100).nonzero().max()) + 1
            scored = labels[1:width] != -100
            zs, zt = (logits_of(model, ids[None, :width])[0, :-1][scored].double() for model in (student, teacher))
            total = total + jsd(0.5).value(zs.log_softmax(-1), zt.detach().log_softmax(-1)).sum()
            tokens += len(zs)
    student.zero_grad()
    (total / tokens + coefficient * balance).backward()
    return {name: weight.grad.double() for name, weight in student.named_parameters() if weight.grad is not None}


def error(found, expected):
    """Relative L2, over all weights; one that has no gradient has zeros."""
    zero = torch.zeros(())
    names = found.keys() | expected.keys()
    difference = sum((found.get(n, zero) - expected.get(n, zero)).square().sum() for n in names)
    return float((difference / sum(g.square().sum() for g in expected.values())).sqrt())


@pytest.mark.parametrize("kind", [*DENSE, *EXPERTS])
def test_gradient_is_that_of_single_rows_without_padding(kind, record):
    """A step on the dataset's rows and one on the student's own, where sampling has to work.

    In fp64 where rounding may send a token to another expert, or over the edge of a ReLU.
    """
    dtype = torch.float64 if kind in (*EXPERTS, "ctrl", "opt") else torch.float32
    student, teacher = make_family(kind, 0, dtype), make_family(kind, 1, dtype)
    exact = torch.float32 if kind == "xglm" else torch.float64  # whose attention has no float64
    whole = [deepcopy(model).to(exact).eval() for model in (student, teacher)]
    trainer = record(student, teacher)
    errors = [
        error(*pair) for pair in zip(trainer.grads, (reference(*whole, r) for r in trainer.rows[:2]), strict=True)
    ]
    print(f"{kind}: {errors[0]:.1e} on the dataset's rows, {errors[1]:.1e} on its own, {dtype}")
    assert max(errors) < 1e-5


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "jamba", "granitemoe", "phimoe"])
def test_balance_of_experts_is_transformers_own(kind, checkpointed, record):
    """With --router_aux_loss_coef; the config, which TRL changes, is what it was."""
    student, teacher = make_family(kind, 0, torch.float64), make_family(kind, 1, torch.float64)
    names = ("output_router_logits", "router_aux_loss_coef")
    before = [getattr(student.config, name) for name in names]
    exact = [deepcopy(model).eval() for model in (student, teacher)]
    trainer = record(student, teacher, router_aux_loss_coef=0.1, gradient_checkpointing=checkpointed)
    for grads, rows, log in zip(trainer.grads, trainer.rows, trainer.state.log_history, strict=False):
        assert error(grads, reference(*exact, rows, 0.1)) < 1e-5
        assert error(grads, reference(*exact, rows)) > 1e-3
        divergence = next(value for name, value in log.items() if name.endswith("/loss"))
        assert log["loss"] == pytest.approx(divergence + 0.1 * log["aux_loss"], rel=1e-4)
    assert [getattr(student.config, name) for name in names] == before


def test_balance_of_experts_is_refused_under_fsdp(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="--router_aux_loss_coef is not supported under FSDP"):
        GKDArguments(router_aux_loss_coef=0.01)
