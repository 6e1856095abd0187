"""Completions follow the model's distribution under any batching; batches are joined without inner padding."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from families import make_family
from prompts import MASK, PROMPTS, config
from tiny import make_model

from gkd.config.generation import GENERATION_BACKENDS
from gkd.data.batch import stack_prompts, training_batch
from gkd.generation.generator import CompletionGenerator, complete, new_generator
from gkd.generation.linears import linear_for_few_rows
from gkd.generation.sampling import sampling_noise, sampling_seed


@pytest.mark.parametrize("kind", ["llama", "rwkv", "recurrent_gemma"])
def test_greedy_equals_plain_generate_row_by_row(kind):
    """Also for a recurrent model that reads padding as text."""
    model = make_family(kind).eval()
    for batch_size in (None, 1, 2):
        completions, mask = CompletionGenerator(batch_size=batch_size)(model, PROMPTS, MASK, config())
        for row in range(3):
            prompt = PROMPTS[row][MASK[row].bool()][None]
            plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config())
            assert completions[row][mask[row].bool()].tolist() == plain[0, prompt.shape[1] :].tolist()


def test_sampled_frequencies_are_the_models_probabilities():
    model = make_model(0, initializer_range=0.1).eval()
    prompt = PROMPTS[1:2].repeat(4000, 1)
    with sampling_noise(3, prompt.device):
        completions, _ = CompletionGenerator()(
            model, prompt, torch.ones_like(prompt), config(max_new_tokens=1, do_sample=True, temperature=0.8)
        )
    expected = torch.softmax(model(PROMPTS[1:2]).logits[0, -1] / 0.8, -1)
    found = torch.bincount(completions[:, 0], minlength=len(expected)) / 4000
    assert (found - expected).abs().sum() / 2 < 0.13  # total variation; sampling error of 4000 draws is about 0.1
    top = expected.topk(10).indices
    torch.testing.assert_close(found[top].sum(), expected[top].sum(), rtol=0, atol=0.03)


def test_noise_repeats_and_leaves_the_global_generator_alone():
    model, state = make_model(0).eval(), torch.get_rng_state()
    texts = []
    for seed in (1, 1, 2):
        with sampling_noise(seed, PROMPTS.device):
            texts.append(CompletionGenerator()(model, PROMPTS, MASK, config(do_sample=True, temperature=2.0))[0])
    assert texts[0].equal(texts[1])
    assert not (texts[0].shape == texts[2].shape and texts[0].equal(texts[2]))
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (3, 1, 7), (100, 7)])
@pytest.mark.parametrize("bias", [None, torch.randn(5)])
def test_linear_for_few_rows(shape, bias):
    x, weight = torch.randn(shape), torch.randn(5, 7)
    out = linear_for_few_rows(x, weight, bias)
    assert out.is_contiguous()
    torch.testing.assert_close(out, F.linear(x, weight, bias))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU")
def test_linears_are_replaced_while_generating_alone(monkeypatch):
    model, rows = make_model(0).eval(), []

    def seen(x, weight, bias=None):
        rows.append(x.numel() // x.shape[-1])
        if len(rows) == 50:
            raise RuntimeError("broken")
        return F.linear(x, weight, bias)

    monkeypatch.setattr("gkd.generation.linears.linear_for_few_rows", seen)
    with pytest.raises(RuntimeError, match="broken"):
        CompletionGenerator()(model, PROMPTS, MASK, config())
    assert set(rows) >= {12, 3}  # the prompts, then a token a row
    model(PROMPTS)
    assert len(rows) == 50
    assert not any("forward" in vars(module) for module in model.modules())


def test_training_batch_is_right_padded_and_scores_the_completion():
    completions = torch.tensor([[30, 31, 2], [32, 2, 0], [33, 34, 35]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    batch = training_batch(PROMPTS, MASK, completions, mask, pad=0)
    assert batch["input_ids"].tolist() == [[20, 21, 30, 31, 2, 0], [22, 23, 24, 25, 32, 2], [26, 27, 28, 33, 34, 35]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6, [1] * 6]
    assert batch["labels"][0].tolist() == [-100, -100, 30, 31, 2, -100]


def test_stack_prompts_pads_left():
    parts = [{"prompts": torch.tensor([[5]]), "prompt_attention_mask": torch.ones(1, 1, dtype=torch.long)}]
    parts.append({"prompts": torch.tensor([[6, 7, 8]]), "prompt_attention_mask": torch.ones(1, 3, dtype=torch.long)})
    prompts, mask = stack_prompts(parts, pad=0)
    assert prompts.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


class Fixed:
    """A generator that completes each prompt by two tokens and a stop, and records its arguments."""

    capture_seconds = 0.0

    def __init__(self, args, **options):
        self.options, self.given = options, []

    def __call__(self, model, prompts, prompt_mask, config):
        self.given.append((model.training, torch.rand(1).item(), torch.is_autocast_enabled("cpu"), config))
        ids = torch.tensor([30, 31, 2], device=prompts.device).expand(len(prompts), -1)
        return ids, torch.ones_like(ids)


@pytest.fixture
def fixed(monkeypatch):
    """Adds a third generator by its name in --generation_backend; returns the list of its instances."""
    made = []

    def new(args, **options):
        made.append(Fixed(args, **options))
        return made[-1]

    monkeypatch.setattr(sys.modules[__name__], "new_fixed", new, raising=False)
    monkeypatch.setitem(GENERATION_BACKENDS, "fixed", f"{__name__}:new_fixed")
    return made


def test_complete_seeds_and_puts_back(fixed, monkeypatch):
    accelerator, generator = Accelerator(), new_generator(SimpleNamespace(generation_backend="fixed"))
    monkeypatch.setattr(accelerator, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    model, state = make_model(0).train(), torch.get_rng_state()
    for seed, autocast in ((1, False), (1, True), (2, False)):
        ids, mask = complete(model, accelerator, generator, PROMPTS, MASK, config(), seed, autocast)
        assert (ids.shape, mask.shape) == ((3, 3), (3, 3))
    training, noise, casts, _ = zip(*generator.given, strict=True)
    assert not any(training)
    assert noise[0] == noise[1] != noise[2]
    assert casts == (False, True, False)
    assert all(module.training for module in model.modules())
    assert torch.get_rng_state().equal(state)


def test_a_generator_walks_in_by_its_name(fixed, train, rows):
    """The new generator writes the text of training and its evaluation, without a change elsewhere."""
    trainer = train(make_model(0), generation_backend="fixed", lmbda=1.0)
    figures = trainer.evaluate(rows)
    (generator,) = fixed
    assert generator.options["batch_size"] == trainer.args.generation_batch_size
    assert trainer.state.log_history[0]["on_policy/completion_length"] == 3
    assert figures["eval_on_policy/completion_length"] == 3
    assert [given[3].do_sample for given in generator.given] == [
        True,
        False,
        False,
    ]  # a step, the teacher, the student


def test_sampling_noise_differs_per_rank_and_repeats(tmp_path):
    assert sampling_seed(0, 5, rank=0) != sampling_seed(0, 5, rank=1)
    assert sampling_seed(0, 5, rank=1) == sampling_seed(0, 5, rank=1)


def test_sampling_seeds_differ_by_everything():
    seeds = {sampling_seed(s, t, r, e) for s in range(3) for t in range(3) for r in range(3) for e in (False, True)}
    assert len(seeds) == 54
