"""The static decoder against transformers' own generate, on the CPU, where it runs without a graph."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from prompts import MASK, PROMPTS, config
from tiny import TINY, make_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gkd.generation.decoder import Decoder, Unsupported
from gkd.generation.generator import CompletionGenerator
from gkd.generation.prompts import PromptPass, padded
from gkd.generation.sampling import sampling_noise
from gkd.generation.static import StaticDecoding, batch_bucket, length_bucket
from gkd.runs.choices import GENERATION_ROWS


def build(name):
    torch.manual_seed(0)
    return {
        "llama": lambda: make_model(0),
        "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(**TINY, sliding_window=6)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TINY)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TINY, head_dim=16)),
        "gemma2, softcaps, sliding window": lambda: Gemma2ForCausalLM(
            Gemma2Config(**TINY, head_dim=16, sliding_window=6, final_logit_softcapping=3.0)
        ),
        "phi3": lambda: Phi3ForCausalLM(Phi3Config(**TINY)),
        "gpt2, learned positions": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
        ),
    }[name]().eval()


@pytest.mark.parametrize(
    "name",
    ["llama", "mistral, sliding window", "qwen2", "qwen3", "gemma2, softcaps, sliding window", "phi3", "gpt2, learned positions"],
)  # fmt: skip
def test_greedy_text_equals_generate(name):
    model = build(name)
    for stops in ([1, 2], [263]):
        options = config(max_new_tokens=20, eos_token_id=stops)
        expected = CompletionGenerator("dynamic")(model, PROMPTS, MASK, options)
        generator = CompletionGenerator("static")
        found = generator(model, PROMPTS, MASK, options)
        assert found[0].tolist() == expected[0].tolist()
        assert found[1].tolist() == expected[1].tolist()
        assert [decoding._passes for decoding in generator._static.values()] == [{torch.float32: True}]


@pytest.mark.parametrize("fails", [False, True])
def test_a_prompt_pass_that_is_wrong_is_not_used(monkeypatch, fails):
    """Its logits differ from those of the model's forward, or it ends with an error."""

    def read(prompt_pass, prompts, mask):
        if fails:
            raise ValueError("no such mask")
        return called(prompt_pass, prompts, mask) * 1.1

    called = PromptPass.__call__
    monkeypatch.setattr(PromptPass, "__call__", read)
    model, decoding = make_model(0).eval(), StaticDecoding()
    expected = CompletionGenerator("dynamic")(model, PROMPTS, MASK, config())[0]
    for _ in range(2):
        assert decoding(model, PROMPTS, MASK, config())[:, : expected.shape[1]].equal(expected)
    assert decoding._passes == {torch.float32: False}


def test_prompts_are_padded_to_few_widths():
    """With what stands at their end, up to so many tokens."""
    ids, mask = padded(PROMPTS, MASK, 4)
    assert ids.shape == mask.shape == (3, 64)
    assert ids[:, -4:].equal(torch.where(MASK.bool(), PROMPTS, PROMPTS[:, -1:]))
    assert mask[:, -4:].equal(MASK)
    assert mask.sum() == MASK.sum()
    assert (ids[:, :-4] == PROMPTS[:, -1:]).all()
    wide = torch.ones(4, 1024, dtype=torch.long)
    assert padded(wide, wide, 4)[0].equal(wide)
    assert padded(wide, wide, 8) is None


def test_one_decoder_serves_other_batches_and_prompts():
    """Rows are padded to a bucket and caches are reused: earlier texts must have no effect."""
    model, generator = make_model(0).eval(), CompletionGenerator("static")
    options = config(max_new_tokens=12)
    for rows in (slice(0, 3), slice(1, 3), slice(0, 1), slice(0, 3)):
        for prompts in (PROMPTS, PROMPTS.flip(0), torch.cat([PROMPTS[:, 2:], PROMPTS[:, 2:]], 1)):
            mask = (prompts != 0).long()
            found = generator(model, prompts[rows], mask[rows], options)[0]
            assert (
                found.tolist() == CompletionGenerator("dynamic")(model, prompts[rows], mask[rows], options)[0].tolist()
            )


def test_weights_that_moved_are_noticed():
    model, decoding, options = make_model(0).eval(), StaticDecoding(), config()
    decoders = []
    for _ in range(2):
        decoding(model, PROMPTS, MASK, options)
        decoders += decoding.decoders.values()
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0).clone()
    moved = decoding(model, PROMPTS, MASK, options)
    decoders += decoding.decoders.values()
    assert decoders[0] is decoders[1] is not decoders[2]
    found = CompletionGenerator("dynamic")(model, PROMPTS, MASK, options)[0]
    assert moved[:, : found.shape[1]].tolist() == found.tolist()


def test_sampled_frequencies_are_the_models_probabilities():
    """The distributions of the first token, from the prompt's pass, and of the second, from the decoder."""
    model = make_model(0, initializer_range=0.1).eval()
    prompt = PROMPTS[1:2].repeat(4000, 1)
    options = config(max_new_tokens=2, do_sample=True, temperature=0.8, eos_token_id=[], suppress_tokens=[262, 263])
    with sampling_noise(3, prompt.device):
        found, _ = CompletionGenerator("static")(model, prompt, torch.ones_like(prompt), options)
    assert (found < 262).all()
    p = model(PROMPTS[1:2]).logits[0, -1] / 0.8
    p[262:] = -torch.inf
    first = torch.softmax(p, -1)
    every = torch.cat([PROMPTS[1:2].expand(262, -1), torch.arange(262)[:, None]], 1)
    q = model(every).logits[:, -1] / 0.8
    q[:, 262:] = -torch.inf
    second = first[:262] @ torch.softmax(q, -1)
    for column, expected in ((0, first), (1, second)):
        frequencies = torch.bincount(found[:, column], minlength=264) / 4000
        # total variation; the sampling error of 4000 draws is about 0.1
        assert (frequencies - expected).abs().sum() / 2 < 0.13, column
        top = expected.topk(10).indices
        torch.testing.assert_close(frequencies[top].sum(), expected[top].sum(), rtol=0, atol=0.03)


def test_lora_model_decodes_its_adapted_distribution():
    torch.manual_seed(0)
    model = get_peft_model(make_model(0), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    expected = CompletionGenerator("dynamic")(model, PROMPTS, MASK, config())[0]
    assert CompletionGenerator("static")(model, PROMPTS, MASK, config())[0].tolist() == expected.tolist()
    plain = CompletionGenerator("static")(make_model(0).eval(), PROMPTS, MASK, config())[0]
    assert plain.tolist() != expected.tolist()


def test_what_it_can_not_do():
    model = make_model(0).eval()
    with pytest.raises(Unsupported, match="top-k"):
        CompletionGenerator("static")(model, PROMPTS, MASK, config(top_k=5, do_sample=True))
    model._can_compile_fullgraph = False
    with pytest.raises(Unsupported, match="static-cache"):
        CompletionGenerator("static")(model, PROMPTS, MASK, config())


def test_auto_is_dynamic_on_a_cpu(monkeypatch):
    monkeypatch.setattr("gkd.generation.static.StaticDecoding.__call__", lambda *a: pytest.fail("static on a CPU"))
    CompletionGenerator("auto")(make_model(0).eval(), PROMPTS, MASK, config())


def test_buckets():
    assert [batch_bucket(n) for n in (1, 2, 3, 6, 8, 9, 17, 32, 33)] == [1, 2, 4, 8, 8, 16, 24, 32, 40]
    lengths = [length_bucket(n) for n in range(1, 4097)]
    assert all(n <= b <= max(64, 1.25 * n + 64) for n, b in enumerate(lengths, 1))
    assert len(set(lengths)) < 25


def test_a_decoder_that_fails_gives_way_and_its_time_stays_counted(monkeypatch):
    generator, model = CompletionGenerator(), make_model(0).eval()

    def broken(decoding, *args):
        decoding.seconds, decoding.captures = 2.0, 1
        raise NotImplementedError  # without a message

    monkeypatch.setattr(CompletionGenerator, "is_static", lambda *args: True)
    monkeypatch.setattr(StaticDecoding, "__call__", broken)
    found, _ = generator(model, PROMPTS, MASK, config())
    assert len(found) == len(PROMPTS)
    assert (generator.capture_seconds, generator.captures) == (2.0, 1)


def fail_after(error):
    """Raises what ending a capture does after an error inside it."""
    try:
        raise error
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.fixture
def short_memory(monkeypatch):
    """Decoders of more than so many rows run out of memory at their second token; as on a GPU, `auto` is static."""

    def make(most, fail):
        run = Decoder.run

        def narrow(decoder):
            if decoder.rows > most:
                decoder._advance()
                fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
            return run(decoder)

        monkeypatch.setattr(Decoder, "run", narrow)
        monkeypatch.setattr(
            CompletionGenerator, "is_static", lambda self, model, *args: model not in self._dynamic_models
        )

    return make


def fail(error):
    raise error


def fail_otherwise(error):
    raise RuntimeError("CUDA error: out of memory")


@pytest.mark.parametrize("fail", [fail, fail_otherwise, fail_after])
def test_out_of_memory_halves_the_rows_and_the_text_is_the_same(monkeypatch, short_memory, caplog, fail):
    model, prompts, mask = make_model(0).eval(), PROMPTS.repeat(4, 1), MASK.repeat(4, 1)
    options = config(do_sample=True, temperature=1.5, max_new_tokens=20)

    def write(generator, seed):
        with sampling_noise(seed, prompts.device):
            return [part.tolist() for part in generator(model, prompts, mask, options)]

    expected = [write(CompletionGenerator("static"), seed) for seed in (1, 2)]
    short_memory(4, fail)
    monkeypatch.setattr("gkd.generation.generator.generate_dynamic", lambda *args: pytest.fail("a dynamic cache"))
    for backend in ("auto", "static"):
        generator = CompletionGenerator(backend)
        assert [write(generator, seed) for seed in (1, 2)] == expected
        assert generator.choices.get(GENERATION_ROWS) == 3
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        f"Out of memory with {rows} prompts generating at a time" for rows in (12, 6) * 2
    ]


def test_one_row_that_does_not_fit_falls_back_to_the_dynamic_cache(short_memory, caplog):
    model, options = make_model(0).eval(), config(max_new_tokens=20)
    expected = CompletionGenerator("dynamic")(model, PROMPTS, MASK, options)
    short_memory(0, fail)
    found = CompletionGenerator("auto")(model, PROMPTS, MASK, options)
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]
    assert "LlamaForCausalLM generates with a dynamic cache, which is slower: OutOfMemoryError" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        CompletionGenerator("static")(model, PROMPTS, MASK, options)


def test_ranks_that_share_weights_never_halve_their_rows(monkeypatch):
    """Another rank would wait for ever in the middle of a forward."""
    attempts = []

    def short(*args):
        attempts.append(args)
        raise torch.OutOfMemoryError

    monkeypatch.setattr("gkd.generation.generator._is_sharded", lambda model: True)
    monkeypatch.setattr("gkd.generation.generator.generate_dynamic", short)
    generator = CompletionGenerator("dynamic")
    with pytest.raises(torch.OutOfMemoryError):
        generator(make_model(0).eval(), PROMPTS, MASK, config())
    assert len(attempts) == 1
    assert generator.choices.get(GENERATION_ROWS) is None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_fp32_weights_under_autocast_are_cast_once_and_followed(tied, lora, monkeypatch):
    """Copied casts give the same bits as autocast's casts at each token, also while the weights train."""
    model = make_model(0, tie_word_embeddings=tied).eval()
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    decoding, plain, options = StaticDecoding(), StaticDecoding(), config(eos_token_id=[], max_new_tokens=20)
    monkeypatch.setattr(plain, "cast_weights", lambda *args: nullcontext())
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = (d(model, PROMPTS, MASK, options).tolist() for d in (decoding, plain))
        assert found == expected
        assert not any("forward" in vars(m) for m in model.modules())
        with torch.no_grad():
            for parameter in model.parameters():  # in place, as an optimizer does
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    (cast,) = decoding.casts.values()
    assert {copy.dtype for copies in cast.copies.values() for copy in copies} == {torch.bfloat16}
    assert set(cast.copies) == {m for m in model.modules() if type(m) is torch.nn.Linear}
    addresses = [copy.data_ptr() for copies in cast.copies.values() for copy in copies]
    # Without autocast the same object works too, with a separate decoder.
    assert decoding(model, PROMPTS, MASK, options).tolist() == plain(model, PROMPTS, MASK, options).tolist()
    assert [copy.data_ptr() for copies in cast.copies.values() for copy in copies] == addresses
    with torch.autocast("cpu", torch.bfloat16):  # uses the cache, which has grown to the size for fp32
        assert decoding(model, PROMPTS, MASK, options).tolist() == plain(model, PROMPTS, MASK, options).tolist()
    assert len(decoding.decoders) == 2


def test_a_layer_with_a_hook_and_one_without_autocast_compute_as_they_did():
    model, decoding, options = make_model(0).eval(), StaticDecoding(), config(eos_token_id=[])
    calls = []

    def hooked(x, own=model.lm_head):
        calls.append(x.dtype)
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), own.weight)

    model.lm_head.forward = hooked
    mlp = model.model.layers[0].mlp
    inner = mlp.forward
    mlp.forward = lambda x: torch.autocast("cpu", enabled=False)(inner)(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        decoding(model, PROMPTS, MASK, options)
    assert model.lm_head.forward is hooked
    assert calls
    (cast,) = decoding.casts.values()
    assert not {model.lm_head, mlp.up_proj} & set(cast.copies)


def test_models_too_large_are_cast_token_by_token(monkeypatch):
    monkeypatch.setattr("gkd.generation.static.device_memory", lambda device: 2**20)  # 5 % are less than the weights
    model, decoding = make_model(0).eval(), StaticDecoding()
    with torch.autocast("cpu", torch.bfloat16):
        decoding(model, PROMPTS, MASK, config())
    assert decoding.casts == {}
