"""Which layers a student is made of, and the model and config without the others."""

from copy import deepcopy
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from families import make_family
from tiny import make_model
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from gkd.models.shrink import CutDivergence, check_layers, count_cuts, search_cuts, shrink

IDS = torch.arange(4, 44).view(2, 20)
SCORED = torch.tensor([5, 6, 7, 30, 31])


def without(model, kept):
    return shrink(deepcopy(model), kept)


def forward_kl(model, kept) -> float:
    """From logits of the shrunk model, in float64."""
    whole, cut = (
        m.eval()(IDS).logits.double().log_softmax(-1).flatten(0, 1)[SCORED] for m in (model, without(model, kept))
    )
    return F.kl_div(cut, whole, reduction="batchmean", log_target=True).item()


@torch.no_grad()
@pytest.mark.parametrize(
    "family", "llama gemma2 gemma3_text gpt2 gptj bloom falcon mamba opt phi qwen3 cohere2 qwen3_moe smollm3".split()
)
def test_what_a_cut_costs_is_the_divergence_of_the_model_without_these_layers(family):
    """Whichever layers are run again, and the model is itself again afterwards."""
    model = make_family(family, layers=5).eval()
    before, config = model(IDS).logits, model.config.to_dict()
    divergence = CutDivergence(model, IDS, SCORED)
    cuts = [(0, 1, 2, 3), (1, 2, 3, 4), (0, 1, 3, 4), (0, 2, 4), (0, 1), (2, 4), (0, 1, 2, 3, 4)]
    expected = [pytest.approx(forward_kl(model, kept), rel=1e-3, abs=1e-5) for kept in cuts]
    assert [divergence(kept) for kept in cuts] == expected
    for followed in ((0, 1, 3, 4), (0, 1, 4), (0, 1)):
        divergence.follow(followed)
        assert [divergence(kept) for kept in cuts] == expected
    assert model.config.to_dict() == config
    assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_layers_that_are_already_known_are_not_run_again():
    model = make_model(0, num_hidden_layers=5).eval()
    divergence = CutDivergence(model, IDS, SCORED)
    runs = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: runs.append(i))
    divergence((0, 1, 2, 4))
    assert runs == [4]
    divergence.follow((0, 2, 3, 4))
    runs.clear()
    divergence((0, 2, 4))
    assert runs == [4]


@torch.no_grad()
def test_the_search_against_brute_force():
    """One layer fewer: the best of all cuts. Three fewer: no worse than each block and than the greedy one."""
    model = make_model(3, num_hidden_layers=6).eval()
    measured = []
    cuts = search_cuts(CutDivergence(model, IDS, SCORED), 3, [3], measured.append)
    assert len(measured) == count_cuts(6, 3, [3]) == 6 + 5 + 4 + 4
    costs = {kept: forward_kl(model, kept) for n in (3, 4, 5) for kept in combinations(range(6), n)}
    best = min((kept for kept in costs if len(kept) == 5), key=costs.get)
    assert cuts[5].kept == best
    greedy = best
    for size in (4, 3):
        greedy = min(combinations(greedy, size), key=costs.get)
        if size == 4:
            assert cuts[4].kept == greedy
    blocks = [tuple(i for i in range(6) if not start <= i < start + 3) for start in range(4)]
    assert cuts[3].kept == min([*blocks, greedy], key=costs.get)
    assert cuts[3].divergence == pytest.approx(costs[cuts[3].kept], rel=1e-3)


@torch.no_grad()
def test_layers_that_do_nothing_are_found():
    """Apart from each other one by one; and two that undo each other, each of which is needed alone, as a block."""
    model = make_model(0, num_hidden_layers=7, mlp_bias=True).eval()
    for i in (1, 4):
        model.model.layers[i].self_attn.o_proj.weight.zero_()
        model.model.layers[i].mlp.down_proj.weight.zero_()
    cut = search_cuts(CutDivergence(model, IDS, SCORED), 5, [])[5]
    assert (cut.kept, cut.way) == ((0, 2, 3, 5, 6), "one by one")
    assert cut.divergence == pytest.approx(0, abs=1e-6)

    model = make_model(0, num_hidden_layers=6, mlp_bias=True).eval()
    push = 5 * torch.randn(32)
    for i, sign in ((3, 1), (4, -1)):
        model.model.layers[i].self_attn.o_proj.weight.zero_()
        model.model.layers[i].mlp.down_proj.weight.zero_()
        model.model.layers[i].mlp.down_proj.bias.copy_(sign * push)
    cut = search_cuts(CutDivergence(model, IDS, SCORED), 4, [4])[4]
    assert (cut.kept, cut.way) == ((0, 1, 2, 5), "block")
    assert cut.divergence == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_a_shrunk_model_has_its_layers_and_generates():
    with pytest.raises(ValueError, match="keep between 2 and 30"):
        check_layers(30, 31)
    teacher = make_model(0, num_hidden_layers=5)
    model = without(teacher, (0, 2, 4))
    assert model.config.num_hidden_layers == 3
    for layer, i in zip(model.model.layers, (0, 2, 4), strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, teacher.model.layers[i].mlp.up_proj.weight)
    cached = model.generate(torch.tensor([[20, 21]]), max_new_tokens=6, do_sample=False, use_cache=True)
    plain = model.generate(torch.tensor([[20, 21]]), max_new_tokens=6, do_sample=False, use_cache=False)
    assert cached.equal(plain)


@torch.no_grad()
def test_a_config_says_which_layers_are_left(tmp_path):
    """Full attention in the first three of five layers, a window of 6 tokens in the others."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}
    config = Qwen2Config(vocab_size=264, num_hidden_layers=5, initializer_range=0.3, **sizes, **window)
    torch.manual_seed(0)
    model = without(Qwen2ForCausalLM(config).eval(), (0, 2, 4))
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read.config.max_window_layers == 2
    assert read.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert torch.equal(read(IDS).logits, model(IDS).logits)
    assert read.config.num_hidden_layers == 3


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3_text", "lfm2", "qwen3_next", "gpt_oss", "smollm3"])
def test_a_model_of_several_kinds_of_layers_is_read_back(family, tmp_path):
    model = without(make_family(family, layers=4).eval(), (0, 2, 3))
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(read(IDS).logits, model(IDS).logits)
