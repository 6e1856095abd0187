"""The teacher's forward: what padding to a captured length must not change, and when there is no graph."""

import pytest
import torch
from tiny import make_model

from gkd.models.heads import last_hidden_states
from gkd.models.packing import padded_length
from gkd.teachers.forward import TeacherForward


def test_padding_on_the_right_is_invisible():
    model = make_model(1).eval()
    ids = torch.randint(3, 264, (2, 37))
    padded = torch.nn.functional.pad(ids, (0, padded_length(37) - 37))
    with torch.no_grad():
        own = last_hidden_states(model, ids, None)
        torch.testing.assert_close(last_hidden_states(model, padded, None)[:, :37], own)
        torch.testing.assert_close(last_hidden_states(model, ids, torch.ones_like(ids)), own)


def test_without_a_gpu_it_is_the_plain_forward(monkeypatch):
    model = make_model(1).eval()
    ids = torch.randint(3, 264, (2, 5))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda *a: pytest.fail("no graph on a CPU"))
    states = TeacherForward(model, 0, enabled=True)(ids, None, torch.tensor([1, 7]))
    with torch.no_grad():
        assert torch.equal(states, last_hidden_states(model, ids, None).flatten(0, 1)[[1, 7]])


def test_lengths_are_few():
    lengths = {padded_length(n) for n in range(1, 2049)}
    assert all(n <= padded_length(n) <= n + max(32, n / 8) for n in range(1, 2049))
    assert len(lengths) < 64


def test_no_search_for_packed_rows(monkeypatch):
    """transformers looks for packed rows where there is no mask, and waits for the GPU; rows are never packed here."""
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda p: pytest.fail("searched"))
    last_hidden_states(make_model(1), torch.randint(3, 264, (2, 5)), None)
