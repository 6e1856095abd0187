"""Which channels an MLP keeps, and the model without the others."""

from copy import deepcopy

import pytest
import torch
from families import make_family
from tiny import make_model
from transformers import AutoModelForCausalLM

from gkd.models.narrow import best_channels, channel_scores, channels_of, gated_mlps, narrow, only_channels

IDS = torch.arange(4, 44).view(2, 20)
MASK = torch.ones_like(IDS)


@pytest.mark.parametrize("family", "llama mistral qwen2 qwen3 gemma2 granite smollm3 cohere".split())
def test_a_narrow_model_computes_with_its_channels(family, tmp_path):
    """As the whole one does without the others, also when it is read back."""
    model = make_family(family).eval()
    channels = best_channels(channel_scores(model, IDS, MASK), 32)
    own = model(IDS).logits
    with only_channels(model, channels):
        expected = model(IDS).logits
    assert not torch.allclose(expected, own)
    assert torch.equal(model(IDS).logits, own)
    student = narrow(model, channels)
    torch.testing.assert_close(student(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert student.config.get_text_config().intermediate_size == 32
    student.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(read(IDS).logits, student(IDS).logits)


@pytest.mark.parametrize("biases", [False, True])
def test_channels_that_add_nothing_go_first(biases):
    model = make_model(0, intermediate_size=64, mlp_bias=biases).eval()
    gone = torch.arange(3, 51, 3)  # 16
    with torch.no_grad():
        for mlp in gated_mlps(model):
            mlp.down_proj.weight[:, gone] = 0.0
            for name in ("gate_proj", "up_proj", "down_proj") if biases else ():
                getattr(mlp, name).bias.normal_()
    own = model(IDS).logits
    channels = best_channels(channel_scores(model, IDS, MASK), channels_of(0.75, 64))
    assert all(not torch.isin(kept, gone).any() for kept in channels)
    torch.testing.assert_close(narrow(model, channels)(IDS).logits, own)
    assert sum(p.numel() for mlp in gated_mlps(model) for p in mlp.parameters()) == 2 * (
        3 * 48 * 32 + (48 * 2 + 32) * biases
    )


def test_a_score_is_what_a_channel_adds_without_padding():
    model = make_model(0).eval()
    mask = MASK.clone()
    mask[1, 12:] = 0
    text = torch.where(mask.bool(), IDS, 7)
    seen = []
    with model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        model(text)
    rows = torch.cat([seen[0][0], seen[0][1, :12]])  # (n, I)
    parts = [rows[:, i, None] * model.model.layers[1].mlp.down_proj.weight[:, i] for i in range(rows.shape[1])]
    expected = torch.stack([part.square().sum(1).mean().sqrt() for part in parts])
    torch.testing.assert_close(channel_scores(model, text, mask)[1], expected)


def test_a_share_is_a_multiple_of_sixteen():
    assert [channels_of(share, 1536) for share in (1.0, 0.825, 0.5, 0.001)] == [1536, 1264, 768, 16]


@pytest.mark.parametrize("family", ["gpt2", "phi3", "qwen3_moe", "qwen2_moe"])
def test_other_mlps_are_refused(family):
    model = make_family(family)
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="has no gated MLP of one size in each layer"):
        gated_mlps(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
