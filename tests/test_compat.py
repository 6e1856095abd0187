"""What gkd uses of TRL beyond its documented API: a failure names the piece that an upgrade has changed."""

import inspect
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from families import make_family
from tiny import REPO, make_model
from torch import nn
from transformers import DynamicCache, GenerationConfig, Trainer, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from workers.future_trl_worker import fields_of_gkd_config, train_two_steps

from gkd import compat
from gkd.compat import set_checkpointing_kwargs
from gkd.generation import decoder as static_decoding
from gkd.training.trainer import GKDTrainer


def test_lowest_versions_are_those_of_pyproject():
    lowest = dict(
        re.findall(r"^([\w-]+)==([\d.]+)$", (REPO / "tests/constraints-lowest.txt").read_text(), re.MULTILINE)
    )
    floors = dict(re.findall(r'^    "([\w-]+)>=([\d.]+)', (REPO / "pyproject.toml").read_text(), re.MULTILINE))
    assert lowest.keys() == {"transformers", "trl", "peft", "accelerate", "datasets"}
    assert lowest == {name: floors[name] for name in lowest}


def test_a_newer_trl_without_its_gkd_trainer_warns_once_and_trains_alike(tmp_path):
    command = [sys.executable, REPO / "tests/workers/future_trl_worker.py", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    newest = compat.NEWEST["trl"]
    assert run.stderr.count(f"trl 99.1.0 is newer than {newest}, the newest that gkd is tested with") == 1
    fields, numbers = json.loads(run.stdout.splitlines()[-1])
    assert fields == fields_of_gkd_config()
    assert numbers == train_two_steps(tmp_path)
    assert len(numbers) == 3


def test_class_hierarchy():
    stock, sft = compat.StockGKDTrainer, compat.SFTTrainer
    assert stock.__mro__[1] is sft, "GKDTrainer no longer sits right above SFTTrainer: see GKDTrainer.__init__ of gkd"
    ours = set(inspect.signature(GKDTrainer.__init__).parameters)
    assert set(inspect.signature(stock.__init__).parameters) <= ours, "TRL's GKDTrainer has a new argument"


def test_hooks_of_transformers():
    for name in ("get_batch_samples", "training_step", "compute_loss", "prediction_step", "evaluation_loop", "log"):
        assert hasattr(Trainer, name)
    # Methods that gkd.training.trainer overrides: a renamed one would silently not be called.
    for name in (
        "_save_checkpoint",
        "_get_output_dir",
        "_push_from_checkpoint",
        "_finalize_training",
        "_get_grad_norm",
        "_track_num_input_tokens",
    ):
        assert name in vars(GKDTrainer)
        assert hasattr(Trainer, name), f"transformers' Trainer has no {name} any more: see gkd.training.checkpointing"
    parameters = list(inspect.signature(Trainer.get_batch_samples).parameters)
    assert parameters == ["self", "epoch_iterator", "num_batches", "device"]


def test_pieces_of_transformers():
    """The internals that the fast paths use or replace: a model's flag, the cache's layers, the search for packed rows."""
    model = make_model(0).eval()
    assert model._can_compile_fullgraph
    cache = DynamicCache()
    model(torch.ones(1, 3, dtype=torch.long), use_cache=True, **{static_decoding.cache_argument(model.model): cache})
    assert [layer.keys.shape for layer in cache.layers] == [(1, 2, 3, 8)] * 2
    assert callable(masking_utils.find_packed_sequence_indices)
    assert static_decoding._ATTENTION in ALL_ATTENTION_FUNCTIONS


def test_generation_config_is_trls(train, student):
    """TRL's attribute can be read, changed in place, and set."""
    trainer = train(student, run=False, lmbda=1.0, max_new_tokens=7, temperature=0.6)
    config = trainer.generation_config
    assert (config.max_new_tokens, config.temperature, config.do_sample, config.top_k) == (7, 0.6, True, 0)
    config.max_new_tokens = 3
    trainer.train()
    assert trainer.state.log_history[0]["on_policy/completion_length"] <= 3
    trainer.generation_config = GenerationConfig(max_new_tokens=1, pad_token_id=0)
    trainer.train()
    assert trainer.state.log_history[-2]["on_policy/completion_length"] == 1


def test_max_new_tokens_may_exceed_max_length_where_nothing_is_generated(train, student):
    trainer = train(student, max_length=24, max_new_tokens=128)
    assert trainer.state.log_history[0]["dataset/loss"] > 0
    with pytest.raises(ValueError, match="--max_new_tokens 128 leaves no room for a prompt in --max_length 24"):
        trainer.evaluate(trainer.train_dataset)
    for options in ({"lmbda": 0.5}, {"seq_kd": True}, {"eval_strategy": "steps"}):
        with pytest.raises(ValueError, match="leaves no room for a prompt"):
            train(student, max_length=24, max_new_tokens=128, **options)


@pytest.mark.parametrize("given", [None, 0.02])
def test_config_of_experts_is_kept(train, given):
    """TRL switches `output_router_logits` on or off, and the student would generate and be saved with that."""
    student = make_family("mixtral")
    student.config.output_router_logits = given is None  # as in a student that TRL has saved
    coefficient = student.config.router_aux_loss_coef
    train(student, make_family("mixtral", 1), lmbda=1.0, router_aux_loss_coef=given)
    assert student.config.output_router_logits is (given is None)
    assert student.config.router_aux_loss_coef == coefficient > 0


def test_run_inside_forward_goes_through_the_wrapper():
    calls = []

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args):
            calls.append("wrapper")
            return self.module(*args)

    inner = nn.Linear(2, 2)
    found = compat.run_inside_forward(Wrapper(inner), inner, lambda x: x + 1, torch.zeros(2))
    assert calls == ["wrapper"]
    assert found.tolist() == [1.0, 1.0]
    assert inner(torch.zeros(1, 2)).shape == (1, 2)  # its own forward is back


def test_stock_generation_contract():
    """Ids with the prompt, a mask that ends after the first stop token, labels of the completion alone."""
    model = make_model(0).eval()
    prompts = torch.tensor([[0, 0, 20, 21], [22, 23, 24, 25]])
    inputs = {"prompts": prompts, "prompt_attention_mask": (prompts != 0).long()}
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=[1, 2])
    ids, mask, labels = GKDTrainer.generate_on_policy_outputs(model, inputs, config)
    assert ids[:, :4].equal(prompts)
    assert mask[:, :4].equal(inputs["prompt_attention_mask"])
    assert (labels[:, :4] == -100).all()
    assert (labels[:, 4:] != -100).equal(mask[:, 4:].bool())


def test_stock_loss_function_is_kept_and_in_fp32():
    """The properties that TRL's tests check of GKDTrainer.generalized_jsd_loss."""
    loss = GKDTrainer.generalized_jsd_loss
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert loss(a, a, beta=beta).item() == 0.0 or abs(loss(a, a, beta=beta).item()) < 1e-6
        assert loss(a, b, beta=beta) >= 0
    torch.testing.assert_close(loss(a, b, beta=0.5), loss(b, a, beta=0.5))  # symmetric in the middle
    torch.testing.assert_close(loss(a, b, beta=0.0), loss(b, a, beta=1.0))  # forward and reverse
    assert loss(a, b, beta=0.5, reduction="none").shape == (2, 3, 5)
    torch.testing.assert_close(loss(a, b, beta=0.1, reduction="sum"), loss(a, b, beta=0.1, reduction="none").sum())
    torch.testing.assert_close(loss(a, b, beta=0.1, reduction="mean"), loss(a, b, beta=0.1, reduction="none").mean())
    assert loss(a, b, temperature=10.0) < loss(a, b, temperature=1.0)
    labels = torch.tensor([[1, -100, 2], [-100, -100, 3]])
    masked = loss(a, b, labels=labels)
    a2 = a.clone()
    a2[0, 1] += 5.0
    torch.testing.assert_close(loss(a2, b, labels=labels), masked)
    assert loss(a, b, labels=torch.full((2, 3), -100)).item() == 0.0
    assert loss(a.bfloat16(), b.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    "given",
    [
        {"gradient_checkpointing_kwargs": {"preserve_rng_state": True}},
        {
            "activation_checkpointing_kwargs": None,
            "gradient_checkpointing_kwargs": {"preserve_rng_state": True},
        },
        {
            "activation_checkpointing_kwargs": {"preserve_rng_state": True},
            "gradient_checkpointing_kwargs": None,
        },
    ],
    ids=["one name", "TRL's", "the newer one"],
)
def test_checkpointing_options_reach_both_names(given):
    args = SimpleNamespace(**given)
    set_checkpointing_kwargs(args, use_reentrant=False, preserve_rng_state=False)
    assert list(vars(args).values()) == [{"use_reentrant": False, "preserve_rng_state": True}] * len(given)
