"""The fused decoding step, in Triton's interpreter on the CPU, against the model's own forward."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from prompts import MASK, PROMPTS, config
from tiny import TINY, make_model
from torch.testing._internal.two_tensor import TwoTensor
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gkd.generation import kernels
from gkd.generation.decoder import cache_argument
from gkd.generation.fused import FusedStep, unsupported
from gkd.generation.generator import generate_dynamic
from gkd.generation.linears import CastWeights, computed_by
from gkd.generation.products import Weight, gated_product, products
from gkd.generation.static import StaticDecoding
from gkd.models.heads import base_of

pytestmark = pytest.mark.skipif(
    kernels.triton is None or torch.cuda.is_available(), reason="needs Triton's interpreter; see test_gpu.py"
)

SHAPE = TINY | {"hidden_size": 48}  # heads of 12


def build(name):
    torch.manual_seed(0)
    model = {
        "llama": lambda: make_model(0),
        "llama, heads of 12, one for all": lambda: make_model(0, hidden_size=48, num_key_value_heads=1),
        "llama, biases": lambda: make_model(0, attention_bias=True, mlp_bias=True),
        "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=6)),
        "qwen2, one layer slides": lambda: Qwen2ForCausalLM(
            Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1)
        ),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
        "qwen3, norms of q and k": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
        "lora": lambda: get_peft_model(
            make_model(0), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        ),
    }[name]()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases, which start as 1 and 0
            parameter.data.normal_(1, 0.2)
    return model.eval()


NAMES = [
    "llama",
    "llama, heads of 12, one for all",
    "llama, biases",
    "mistral, sliding window",
    "qwen2, one layer slides",
    "qwen2",
    "qwen3, norms of q and k",
    "lora",
]


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_step_equals_the_models_forward(name, few):
    """Columns that hold nothing of a row are NaN, and so is all of a row that has finished."""
    model, rows, width, length = build(name), 4, 70, 150
    assert unsupported(model) is None
    body = base_of(model).base_model
    ids = torch.randint(5, 264, (rows, width))
    mask = (torch.arange(width) >= torch.tensor([[0], [4], [66], [30]])).long()
    position = (mask.cumsum(1) - 1).clamp(min=0)

    def plain(columns):
        cache = DynamicCache()
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
        inputs = {name: tensor[:, :columns] for name, tensor in inputs.items()}
        return body(**inputs, **{cache_argument(body): cache}, use_cache=True)[0][:, -1], cache.layers

    (expected, stored), (_, before) = plain(width), plain(width - 1)
    finished, layers = torch.tensor([False, False, False, True]), []
    for layer in before:
        pair = []
        for tensor in (layer.keys, layer.values):
            kept = torch.full((rows, tensor.shape[1], length, tensor.shape[3]), torch.nan)
            kept[:, :, : width - 1] = tensor.where(mask[:, None, :-1, None].bool(), torch.nan)
            kept[finished] = torch.nan
            pair.append(kept)
        layers.append(tuple(pair))
    step = FusedStep(model, layers, few)
    assert len(step.weights) == (2 if few and name not in ("lora", "llama, biases") else 0)
    found = step(ids[:, -1:], position[:, -1:], (mask == 0).sum(1), finished, torch.tensor([width - 1]))[:, 0]
    torch.testing.assert_close(found[~finished], expected[~finished], rtol=1e-4, atol=1e-4)
    assert found.isfinite().all()
    for (keys, values), layer in zip(layers, stored, strict=True):
        for mine, theirs in ((keys, layer.keys), (values, layer.values)):
            torch.testing.assert_close(mine[:3, :, width - 1], theirs[:3, :, -1], rtol=1e-4, atol=1e-4)
            assert mine[:, :, width:].isnan().all()


@pytest.mark.parametrize(("softcap", "window"), [(None, None), (2.0, None), (None, 70)])
def test_attention_is_split_over_programs(softcap, window):
    """A long cache of few rows, with softcaps and windows; of a row that has finished nothing is read."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 3, 3, 300, 8).unbind(0)  # (B, Hkv, L, D)
    query, start, slot = torch.randn(3, 1, 6 * 8), torch.tensor([0, 130, 0]), 250
    scores = query.view(3, 3, 2, 8) @ keys.transpose(2, 3) * 0.3  # (B, Hkv, G, L)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    columns, finished = torch.arange(300), torch.tensor([False, False, True])
    seen = (columns >= start[:, None]) & (columns <= slot) & (columns > slot - (window or 300))
    expected = torch.softmax(scores.masked_fill(~seen[:, None, None], -torch.inf), -1) @ values
    expected[finished] = 0
    found = kernels.attend(query, keys, values, start, finished, torch.tensor([slot]), 0.3, window, softcap)
    torch.testing.assert_close(found, expected.reshape(3, 1, -1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_products_of_few_rows():
    """Of weights that end inside of a block, in both directions, for more rows than a block's least."""
    torch.manual_seed(0)
    for rows, width, dtype in ((3, 96, torch.float32), (20, 300, torch.float32), (35, 512, torch.float16)):
        x = torch.randn(rows, 1, width).to(dtype)
        weights = [(torch.randn(size, width) / width**0.5).to(dtype) for size in (70, 33, 16)]
        expected = [x[:, 0].float() @ weight.float().T for weight in weights]
        found = products(x, weights).sum(0)
        torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(products(x, weights[:1]).sum(0), expected[0], rtol=1e-5, atol=1e-5)
        up = weights[0].flip(0).clone()
        gated = torch.nn.functional.silu(expected[0]) * expected[0].flip(1)
        found = gated_product(x, weights[0], up)[:, 0]
        torch.testing.assert_close(found, gated.to(dtype), rtol=1e-3, atol=1e-5)


def test_which_weights_a_product_takes():
    """Those of a plain layer, with what is merged into them, or their casts; none where there is more to compute."""
    layer = get_peft_model(make_model(0), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    layer = layer.base_model.model.model.layers[0].self_attn.q_proj
    base = layer.base_layer
    assert Weight.of(base).weight.data_ptr() == base.weight.data_ptr()
    assert Weight.of(base).bias is None
    assert Weight.of(layer) is None
    layer.enable_adapters(False)
    assert Weight.of(layer).weight.data_ptr() == base.weight.data_ptr()
    layer.enable_adapters(True)
    layer.merge()
    assert Weight.of(layer).weight.data_ptr() == base.weight.data_ptr()
    layer._disable_adapters = True  # it unmerges when it is called
    assert Weight.of(layer) is None
    casts, x = CastWeights(), torch.randn(1, 32)
    with torch.autocast("cpu", torch.bfloat16), casts.used_by([base]):
        assert Weight.of(base) is None  # no copy yet
        base(x)
        assert Weight.of(base).weight.equal(base.weight.bfloat16())
    with computed_by(lambda layer, x: x, [base]):
        assert Weight.of(base) is None
    packed = torch.nn.Linear(4, 4, bias=False)
    packed.weight = torch.nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)))  # which has no address
    assert Weight.of(packed) is None
    base.register_forward_hook(lambda *args: None)
    assert Weight.of(base) is None


@torch.no_grad()
def test_half_precision_rounds_where_the_model_does():
    model = make_model(0, dtype=torch.float16).eval()
    norm, (x, residual) = model.model.norm, torch.randn(2, 3, 1, 32).half()
    norm.weight.normal_(1, 0.2)
    added = residual + x
    assert kernels.add_norm(x, residual, norm, torch.float16).equal(norm(added))
    assert residual.equal(added)
    gate, up = torch.randn(2, 3, 1, 1500).half()
    assert kernels.gated(gate, up).equal(torch.nn.functional.silu(gate) * up)


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_log_sums_of_blocks():
    """The kernel, which a GPU alone runs: blocks of any size, all of -inf, and NaN."""
    blocks = torch.randn(3, 4, 96).bfloat16()
    blocks[0, 1], blocks[1, 2, 5] = -torch.inf, torch.nan
    out = torch.empty(3, 4)
    kernels._log_sum[12,](blocks, out, 0.7, SIZE=96, BLOCK=128)
    torch.testing.assert_close(out, torch.logsumexp(blocks.float() / 0.7, -1), equal_nan=True)
    assert out[0, 1] == -torch.inf


@pytest.fixture
def fusing(monkeypatch, request):
    """Decoders fuse their steps on the CPU too; returns the reasons of those that did not."""
    reasons = []

    def fuse(decoding, decoder):
        if decoder.fused is None:
            reasons.append(decoder.fuse(getattr(request, "param", False)))

    monkeypatch.setattr(StaticDecoding, "_make_ready", fuse)
    return reasons


@pytest.mark.parametrize("fusing", [False, True], indirect=True)
def test_text_equals_generate_while_decoders_shrink(fusing, monkeypatch):
    """A cache that is not cleared for fused steps, and twice, over what the first time left."""
    monkeypatch.setattr("gkd.generation.decoder._STEPS_BETWEEN_CHECKS", 2)
    for module in ("decoder", "static"):
        monkeypatch.setattr(f"gkd.generation.{module}.fewer_rows", lambda rows: 1 << (rows - 1).bit_length())
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model, decoding = make_model(0, **shape).eval(), StaticDecoding()
    ids = torch.tensor([[0, 0, 40], [0, 41, 42], [43, 44, 45], [0, 46, 47]])
    texts = generate_dynamic(model, ids, (ids != 0).long(), config(max_new_tokens=13, eos_token_id=[263]))
    options = config(max_new_tokens=13, eos_token_id=[int(texts[0, 1]), int(texts[1, 4]), int(texts[2, 7])])
    for rows in (ids, ids.flip(0)):
        mask = (rows != 0).long()
        expected = generate_dynamic(model, rows, mask, options)
        found = decoding(model, rows, mask, options)
        assert found[:, : expected.shape[1]].equal(expected)
    assert {decoder.rows for decoder in decoding.decoders.values()} == {4, 2, 1}
    assert fusing == [None] * 3


def test_a_step_that_is_wrong_is_not_used(fusing, monkeypatch):
    model, attend = make_model(0).eval(), kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *args: attend(*args) * 1.1)
    expected = generate_dynamic(model, PROMPTS, MASK, config())
    decoding = StaticDecoding()
    assert decoding(model, PROMPTS, MASK, config())[:, : expected.shape[1]].equal(expected)
    (reason,) = fusing
    assert reason.startswith("its logits differ by ")
    assert next(iter(decoding.decoders.values())).fused is None


def test_what_is_not_fused(monkeypatch):
    gemma = Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=16))
    assert unsupported(gemma) == "Gemma2Model has layers of its own"
    assert unsupported(make_model(0, hidden_act="gelu")) == "its activation is gelu"
    for hook in ("register_forward_hook", "register_forward_pre_hook"):
        model = make_model(0)
        getattr(model.model.embed_tokens, hook)(lambda *args: None)  # which is called, as linear layers are
        assert unsupported(model) is None
        getattr(model.model.layers[1].mlp, hook)(lambda *args: None)
        assert unsupported(model) == "LlamaMLP has hooks"
    other = type("LlamaModel", (type(model.model),), {"__module__": "theirs"})  # by trust_remote_code
    model = make_model(0)
    model.model.__class__ = other
    assert unsupported(model) == "LlamaModel has layers of its own"
    monkeypatch.setattr(kernels, "triton", None)
    assert unsupported(make_model(0)) == "Triton is not installed, or does not run here"
