"""One uniform number decides a token: by the model's probabilities, and whatever rows generate beside it."""

import sys

import pytest
import torch
from prompts import config
from tiny import make_model

from gkd.generation.decoder import fewer_rows
from gkd.generation.generator import CompletionGenerator, generate_dynamic
from gkd.generation.sampling import draw, sampling_noise, uniform_noise
from gkd.generation.static import CACHE_SHARE, StaticDecoding, length_bucket, rows_that_fit
from gkd.io.errors import RunStopped


def drawn(logits, uniforms, temperature):
    """How often each token is drawn."""
    parts = [draw(logits.expand(len(part), -1), part, temperature) for part in uniforms.split(2000)]
    assert all(finite.all() for _, finite in parts)
    return torch.bincount(torch.cat([token for token, _ in parts]), minlength=len(logits)).double()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [264, 1000, 251, 7, 512, 96])
def test_each_token_has_its_share_of_the_numbers(size, dtype, temperature):
    """Of N numbers evenly spaced, N · p fall to a token, but for one at either end."""
    torch.manual_seed(size)
    logits, count = (torch.randn(size) * 2).to(dtype), 8000
    logits[-3:] = -torch.inf
    logits[0] = -torch.inf
    found = drawn(logits, (torch.arange(count, dtype=torch.float64) + 0.5) / count, temperature)
    expected = torch.softmax(logits.double() / temperature, -1) * count
    assert (found - expected).abs().max() < 1.1
    assert found[-3:].sum() + found[0] == 0
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits.expand(2, -1), ends, temperature)[0].tolist() == [1, size - 4]


def test_the_noise_is_uniform_and_each_rows_own():
    noise = uniform_noise(3, 500, 40)
    assert uniform_noise(3, 4, 7).equal(noise[:4, :7])
    assert not uniform_noise(4, 4, 7).eq(noise[:4, :7]).any()
    assert noise.unique().numel() == noise.numel()
    for numbers in (noise.flatten(), noise[:, 0], noise[7]):  # of all, a token of each row, the tokens of a row
        found = torch.histc(numbers, 10, 0, 1)
        expected = len(numbers) / 10
        assert ((found - expected) ** 2 / expected).sum() < 28  # χ² of 9 degrees of freedom: p = 0.001
    between = torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1]
    assert abs(between) < 0.03


@pytest.mark.parametrize("size", [264, 1000, 251])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_told(size, value):
    logits = torch.randn(4, size)
    logits[1, size // 2], logits[2, size - 1], logits[3] = value, value, -torch.inf
    token, finite = draw(logits, torch.tensor([0.2, 0.0, 0.99, 0.5], dtype=torch.float64), 1.0)
    assert finite.tolist() == [True, False, False, False]
    assert ((token >= 0) & (token < size)).all()


# ---------------------------------------------------------------------- text

STOPS = list(range(1, 24))


@pytest.fixture(scope="module")
def model():
    return make_model(0).double().eval()


@pytest.fixture(scope="module")
def prompts():
    """40, left-padded, of 1 to 9 tokens; and their mask."""
    torch.manual_seed(0)
    mask = (torch.arange(9) >= torch.randint(0, 9, (40, 1))).long()
    return torch.randint(24, 262, mask.shape) * mask, mask


def rows_of(ids, mask):
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


def test_text_does_not_depend_on_the_rows_beside_it(model, prompts):
    prompts, mask = prompts[0][:10], prompts[1][:10]
    options = config(
        max_new_tokens=24, do_sample=True, temperature=1.0, eos_token_id=STOPS, suppress_tokens=[262, 263]
    )
    texts = []
    for backend in ("dynamic", "static"):
        for batch_size in (None, 1, 3):
            with sampling_noise(5, prompts.device):
                texts.append(
                    rows_of(*CompletionGenerator(backend, batch_size=batch_size)(model, prompts, mask, options))
                )
    assert all(text == texts[0] for text in texts)
    assert len({tuple(row) for row in texts[0]}) == 10
    assert len({len(row) for row in texts[0]}) > 4
    noise, order = uniform_noise(9, 10, 24), torch.randperm(10, generator=torch.Generator().manual_seed(1))
    for write in (StaticDecoding(), generate_dynamic):
        text = write(model, prompts, mask, options, noise)
        other = write(model, prompts[order], mask[order], options, noise[order])
        assert other.equal(text[order])


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_smaller_decoders_go_on_where_larger_ones_stopped(model, prompts, monkeypatch, sampled):
    """Rows end at very different times, and prompts are read in chunks; twice, over what the first time left."""
    monkeypatch.setattr("gkd.generation.static.PROMPT_TOKENS", 64)
    prompts, mask = prompts
    options = config(max_new_tokens=70, eos_token_id=STOPS[:8], do_sample=sampled)
    options.temperature = 1.0 if sampled else None
    decoding = StaticDecoding()
    for seed in (1, 2):
        noise = uniform_noise(seed, 40, 70) if sampled else None
        expected = generate_dynamic(model, prompts, mask, options, noise)
        found = decoding(model, prompts, mask, options, noise)
        assert found[:, : expected.shape[1]].equal(expected)
        assert (found[:, expected.shape[1] :] == 0).all()
        prompts, mask = prompts.flip(0), mask.flip(0)
    assert {decoder.rows for decoder in decoding.decoders.values()} == {40, 16, 8}


def test_how_few_rows_go_on_by_themselves():
    assert [fewer_rows(rows) for rows in (1, 8, 9, 16, 17, 100)] == [8, 8, 16, 16, 32, 128]


@pytest.mark.parametrize("backend", ["dynamic", "static"])
def test_weights_that_are_not_finite_stop_the_run(prompts, backend):
    """One id's logits alone, which only sampling notices."""
    model = make_model(0).eval()
    model.lm_head.weight.data[200] = torch.nan
    options = config(do_sample=True, temperature=1.0)
    with pytest.raises(RunStopped, match="The logits of LlamaForCausalLM are not finite"):
        CompletionGenerator(backend)(model, *prompts, options)


def test_a_row_that_has_stopped_may_have_logits_that_are_not_finite(prompts):
    """It goes on with padding, whose embedding may be anything."""
    model, (ids, mask) = make_model(0).eval(), prompts
    rows = mask.all(1)
    options = config(max_new_tokens=20, do_sample=True, temperature=1.0, eos_token_id=STOPS)
    noise = uniform_noise(0, int(rows.sum()), 20)
    expected = StaticDecoding()(model, ids[rows], mask[rows], options, noise)
    assert (expected == 0).any()
    model.model.embed_tokens.weight.data[0] = torch.nan
    assert StaticDecoding()(model, ids[rows], mask[rows], options, noise).equal(expected)


def test_the_cache_of_rows_together_takes_its_share_of_a_gpu(monkeypatch):
    model, length = make_model(0), 100
    monkeypatch.setattr("gkd.generation.static.device_memory", lambda device: 2**24)
    rows = rows_that_fit(model, length, torch.device("cuda"))
    config = model.config
    one = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * 8 * length_bucket(length)  # fp32
    assert rows * one <= CACHE_SHARE * 2**24 < (rows + 1) * one
    assert rows_that_fit(model, 10**9, torch.device("cuda")) == 1
    assert rows_that_fit(model, length, torch.device("cpu")) == sys.maxsize
