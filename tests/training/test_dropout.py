"""Dropout: which modules draw, whose is turned off, and when a forward's random state is kept."""

import pytest
from families import make_family
from peft import LoraConfig, get_peft_model
from tiny import make_model
from torch import nn

from gkd.training.dropout import disable_base_dropout, has_dropout, random_modules, settle_dropout


@pytest.mark.parametrize(("config", "expected"), [({}, False), ({"attention_dropout": 0.1}, True)])
def test_dropout_that_modules_call_as_a_function_counts(config, expected):
    """Gradient checkpointing must restore the random state, although there is no nn.Dropout."""
    model = make_model(0, **config)
    assert bool(has_dropout(model)) is expected
    disable_base_dropout(model)
    assert not has_dropout(model)


class Hiss(nn.Module):
    """Dropout by a function call, in a module of another name."""

    def __init__(self):
        super().__init__()
        self.chance = 0.3

    def forward(self, x):
        return nn.functional.dropout(x, self.chance, self.training)


def test_dropout_is_found_by_what_a_forward_draws():
    """LoRA's dropout too, which stays on."""
    model = make_model(0)
    for layer in model.model.layers:
        layer.mlp.act_fn = Hiss()
    lora = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.25, target_modules=["q_proj"]))
    disable_base_dropout(lora)
    noisy = {layer.mlp.act_fn for layer in model.model.layers}
    of_lora = {layer.self_attn.q_proj.lora_dropout["default"] for layer in model.model.layers}
    assert set(random_modules(lora)[0]) == noisy | of_lora
    drawing, evaluating = settle_dropout(lora, disable=True, checkpointed=True, callable_alone=True)
    assert drawing
    assert set(evaluating) == noisy
    assert set(random_modules(lora, evaluating)[0]) == of_lora
    assert settle_dropout(lora, disable=False, checkpointed=True, callable_alone=True) == (True, [])


@pytest.mark.parametrize("callable_alone", [True, False], ids=["by a forward", "by names"])
@pytest.mark.parametrize("kind", ["gpt_bigcode", "mixtral", "phimoe", "seed_oss", "starcoder2"])
def test_no_randomness_is_left(kind, callable_alone):
    model = make_family(kind)
    disable_base_dropout(model)
    drawing, evaluating = settle_dropout(model, disable=True, checkpointed=True, callable_alone=callable_alone)
    assert not drawing
    assert random_modules(model, evaluating)[0] == []


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, False), (0.5, True)])
def test_checkpointing_saves_the_random_state_for_dropout_alone(train, dropout, expected):
    config = LoraConfig(r=2, lora_dropout=dropout, target_modules=["q_proj"])
    trainer = train(make_model(0, attention_dropout=0.5), peft_config=config, gradient_checkpointing=True)
    options = trainer.model.get_base_model().model.layers[0]._gradient_checkpointing_func.keywords
    assert options.get("preserve_rng_state", True) is expected
