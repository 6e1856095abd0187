"""Rows without padding, in a line: hidden states, losses and gradients are those of padded rows. On a CPU attention is
computed row by row there, on a GPU by PyTorch's kernel (tests/test_gpu.py)."""

import pytest
import torch
from accelerate import PartialState
from families import DENSE, make_family
from peft import LoraConfig, get_peft_model
from tiny import make_model
from transformers import Lfm2Config, Lfm2ForCausalLM

from gkd.models import packing
from gkd.models.heads import last_hidden_states
from gkd.models.packing import Line, attends_by_row, can_pack, line_states, padded_length

LENGTHS = torch.tensor([17, 40, 3, 40])


@pytest.fixture
def on_cpu(monkeypatch):
    PartialState()  # for the log
    monkeypatch.setattr(packing, "_DEVICES", ("cuda", "cpu"))


def rows(vocabulary=200):
    torch.manual_seed(0)
    ids = torch.randint(5, vocabulary, (4, 40))
    real = torch.arange(40) < LENGTHS[:, None]
    return ids * real, real


def test_a_line_has_each_row_once_and_few_shapes():
    ids, real = rows()
    scored = real.flatten().nonzero()[:, 0][1::3]
    line = Line.of(ids, scored, LENGTHS)
    assert line.ids.shape == line.positions.shape == (1, padded_length(100))
    assert line.ids[0, :100].equal(ids[real])
    assert not line.ids[0, 100:].any()
    assert line.ids[0, line.scored].equal(ids.flatten()[scored])
    assert line.ends.tolist()[:6] == [0, 17, 57, 60, 100, len(line.ids[0])]
    for start, end in zip(line.ends.tolist(), line.ends.tolist()[1:], strict=False):
        assert line.positions[0, start:end].tolist() == list(range(end - start))
        assert end - start <= line.longest
    draw = torch.Generator().manual_seed(0)
    shapes = set()
    for _ in range(200):
        lengths = torch.randint(1, 41, (4,), generator=draw)
        shapes.add(Line.of(ids, torch.zeros(0, dtype=torch.long), lengths).shape)
    assert len(shapes) <= 6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_padded_rows(checkpointing):
    """A checkpointed layer runs again in the backward, where it must find the rows again."""
    model = make_model(0).double().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, real = rows()
    scored = real.flatten().nonzero()[:, 0]
    weight = torch.rand(len(scored), model.config.hidden_size, dtype=torch.double)
    found = []
    for packed in (False, True):
        with attends_by_row(model):
            if packed:
                line = Line.of(ids, scored, LENGTHS)
                states = line_states(model, line)[0, line.scored]
            else:
                states = last_hidden_states(model, ids, None)[real]
            (states * weight).sum().backward()
        found.append([states.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    for padded, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-10, atol=1e-10)


def test_outside_of_a_line_attention_is_as_it_was():
    model = make_model(0).eval()
    ids, real = rows()
    with torch.no_grad():
        expected = [last_hidden_states(model, ids, mask) for mask in (None, real.long())]
        with attends_by_row(model):
            assert model.config._attn_implementation == "gkd_packed"
            found = [last_hidden_states(model, ids, mask) for mask in (None, real.long())]
    assert model.config._attn_implementation == "sdpa"
    assert all(map(torch.equal, found, expected))


def test_which_architectures_can_is_measured(on_cpu):
    """None is wrong: rows of a family that passes are as they are alone, longer ones too."""
    can = {kind for kind in DENSE if can_pack(make_family(kind), torch.device("cpu"), kind)}
    assert can >= {"llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "olmo2", "granite"}
    assert not can & {"gemma2", "falcon_h1", "mamba2", "bloom"}  # softcap, states of rows before, other positions
    ids, real = rows()
    for kind in sorted(can):
        model = make_family(kind).eval()
        line = Line.of(ids, real.flatten().nonzero()[:, 0], LENGTHS)
        with torch.no_grad(), attends_by_row(model):
            found = line_states(model, line)[0, line.scored]
            torch.testing.assert_close(
                found, last_hidden_states(model, ids, None)[real], rtol=1e-3, atol=1e-3, msg=kind
            )


def test_a_state_that_leaks_into_the_next_row_is_seen(on_cpu):
    """A convolution over three tokens, in one layer of two."""
    sizes = {
        name: getattr(make_family("lfm2").config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = Lfm2Config(**sizes, **heads, layer_types=["conv", "full_attention"])
    model = Lfm2ForCausalLM(config).eval()
    for parameter in model.parameters():  # a layer that adds next to nothing tells nothing
        parameter.data.mul_(10)
    assert not can_pack(model, torch.device("cpu"), "student")


@pytest.mark.parametrize("trains", [False, True])
def test_what_training_adds_is_measured_too(on_cpu, monkeypatch, trains):
    """Dropout of the attention, which the kernel has not; a backward that fails."""
    assert can_pack(make_model(0).eval(), torch.device("cpu"), "student", trains)
    model = make_model(0, attention_dropout=0.1).eval()
    state = torch.get_rng_state()
    assert can_pack(model, torch.device("cpu"), "student", trains) != trains
    assert not any(module.training for module in model.modules())
    assert torch.get_rng_state().equal(state)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, states):
            return states.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no backward for heads of this width")

    by_rows = packing._attention_by_rows
    monkeypatch.setattr(packing, "_attention_by_rows", lambda *args: Fails.apply(by_rows(*args)))
    for model in (make_model(0), get_peft_model(make_model(0), LoraConfig(r=2, target_modules="all-linear"))):
        assert can_pack(model, torch.device("cpu"), "student", trains) != trains
        assert all(p.grad is None for p in model.parameters())


def test_a_window_that_only_a_mask_tells_of_is_not_tried(on_cpu, monkeypatch):
    model = make_family("mistral")
    assert can_pack(model, torch.device("cpu"), "student")
    monkeypatch.setattr(type(model), "_supports_flash_attn", False)
    assert not can_pack(model, torch.device("cpu"), "student")


def test_on_a_cpu_rows_are_padded():
    assert not can_pack(make_model(0), torch.device("cpu"), "student")
