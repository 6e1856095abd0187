"""LoRA merged for a generation: the distribution is the same, and the weights' bits are restored."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model
from trainers import tiny_trainer

from gkd.models import lora
from gkd.models.lora import merged_lora


def adapted(dtype=torch.bfloat16, tied=False, **config):
    torch.manual_seed(0)
    model = make_model(0, dtype=dtype, tie_word_embeddings=tied)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**(options | config))).eval()


IDS = torch.arange(20, 40)[None]


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True}, {"target_modules": ["lm_head", "q_proj"]}])  # fmt: skip
def test_every_weight_has_its_bits_again(config):
    """At the same addresses all the time, which CUDA graphs read."""
    model = adapted(**config)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = model(IDS).logits
    with torch.no_grad(), merged_lora(model) as merged:
        assert merged
        assert [parameter.data_ptr() for parameter in model.parameters()] == places
        inside = model.state_dict()
        assert any(not torch.equal(inside[name], tensor) for name, tensor in before.items())
        torch.testing.assert_close(
            model(IDS).logits, own, rtol=0.1, atol=0.3
        )  # bf16: the sum is rounded to the weight
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(model(IDS).logits, own)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}])
def test_merging_again_works(config):
    """Nothing of a merge is left behind, in the adapters' own books either."""
    model = adapted(torch.float32, **config)
    own = model(IDS).logits
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    inside = []
    for _ in range(2):
        with torch.no_grad(), merged_lora(model) as merged:
            assert merged
            assert all(layer.merged for layer in layers)
            inside.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            inside[-1]["logits"] = model(IDS).logits
        assert not any(layer.merged or layer.merged_adapters for layer in layers)
        assert torch.equal(model(IDS).logits, own)
    torch.testing.assert_close(inside[0]["logits"], own, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(inside[1][name], tensor) for name, tensor in inside[0].items())
    with torch.no_grad(), merged_lora(model), merged_lora(model) as again:
        assert not again  # nor does it undo the outer merge
        assert all(layer.merged for layer in layers)
    for layer in layers:  # a change of the adapter takes effect
        layer.lora_B["default"].weight.data *= 2
    changed = model(IDS).logits
    with torch.no_grad(), merged_lora(model):
        torch.testing.assert_close(model(IDS).logits, changed, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(changed, own, atol=1e-2)


def test_subtracting_would_not_do():
    """peft's own unmerge leaves rounding errors: the reason for copying the weights."""
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    model.unmerge_adapter()
    assert any(not torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_fp32_merge_is_the_same_function():
    model = adapted(torch.float32)
    own = model(IDS).logits
    with torch.no_grad(), merged_lora(model):
        torch.testing.assert_close(model(IDS).logits, own, rtol=1e-4, atol=1e-4)


def test_an_error_inside_restores_too():
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), merged_lora(model):
        raise KeyboardInterrupt
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_short_memory_leaves_the_adapters_as_they_are(monkeypatch):
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers, merge = [m for m in model.modules() if hasattr(m, "lora_A")], lora._merge

    def short(layer):
        if layer is layers[3]:
            raise torch.OutOfMemoryError("full")
        merge(layer)

    monkeypatch.setattr(lora, "_merge", short)
    own = model(IDS).logits
    with torch.no_grad(), merged_lora(model) as merged:
        assert not merged
        assert torch.equal(model(IDS).logits, own)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_head_tied_to_the_embedding_is_left_alone():
    model = adapted(tied=True, target_modules=["lm_head", "q_proj"])
    with torch.no_grad(), merged_lora(model) as merged:
        assert not merged


def test_training_goes_on_after_a_merge():
    model = adapted(torch.float32)
    with torch.no_grad(), merged_lora(model):
        pass
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_casts_left_out_change_no_bit(tmp_path, rows, monkeypatch):
    """bf16 weights with fp32 adapters under autocast: peft's cast to fp32 and back does not happen."""
    adapters = []
    for skip in (True, False):
        models = (make_model(seed, dtype=torch.bfloat16) for seed in (0, 1))
        more = {"peft_config": LoraConfig(r=2, target_modules="all-linear")}
        flags = {
            "max_steps": 2,
            "learning_rate": 1e-2,
            "bf16": True,
            "gradient_checkpointing": True,
            "max_new_tokens": 8,
        }
        trainer = tiny_trainer(tmp_path / str(skip), *models, rows, more=more, **flags)
        seen = []
        layer = next(m for m in trainer.model.modules() if hasattr(m, "lora_A"))
        layer.lora_A["default"].register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].dtype))
        if not skip:
            monkeypatch.setattr("gkd.training.trainer.disable_input_dtype_casting", lambda *a, **k: nullcontext())
        trainer.train()
        assert set(seen) == {torch.bfloat16 if skip else torch.float32}
        adapters.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_quantized_weights_stay_unmerged_however_they_are_stored():
    """bitsandbytes may store 4-bit weights as bf16, but in a class of its own."""

    class Quantized(torch.nn.Parameter):
        pass

    model = adapted()
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    layer.weight = Quantized(layer.weight.data, requires_grad=False)
    with torch.no_grad(), merged_lora(model) as merged:
        assert not merged


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_weights_are_those_of_peft(dtype, config):
    model = adapted(dtype, **config)
    with torch.no_grad(), merged_lora(model):
        found = {name: weight.clone() for name, weight in model.state_dict().items()}
        assert next(m.merged_adapters for m in model.modules() if hasattr(m, "lora_A")) == ["default"]
    model.merge_adapter()
    assert all(torch.equal(found[name], weight) for name, weight in model.state_dict().items())


def test_what_peft_cannot_merge_stays_unmerged():
    model = adapted(torch.float32, lora_bias=True)  # into layers without a bias
    own = model(IDS).logits
    with torch.no_grad(), merged_lora(model) as merged:
        assert not merged
        assert torch.equal(model(IDS).logits, own)
