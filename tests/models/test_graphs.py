"""Which forwards are captured as CUDA graphs, and when they are dropped. What they compute: tests/test_gpu.py."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import PartialState
from tiny import make_model

from gkd.models.graphs import Graphs


@pytest.fixture
def graphs(monkeypatch):
    """Of a model on the CPU; a capture is whatever it returns."""
    PartialState()  # for the log
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return Graphs("This forward", make_model(0), enabled=True)


def get(graphs, key):
    return graphs.get(key, object, torch.device("cpu"))


def test_a_few_shapes_are_captured_at_once_and_others_that_come_again(graphs):
    first = [get(graphs, key) for key in range(4)]
    assert None not in first
    assert [get(graphs, key) for key in range(4)] == first
    assert [get(graphs, 4) is None for _ in range(3)] == [True, True, False]


def test_graphs_go_with_the_weights_that_they_read(graphs):
    """At their addresses, and with the gradients that they write."""
    weight = graphs.model.lm_head.weight
    before, pool = get(graphs, 0), graphs.pool
    graphs.shared = ["buffers"]
    assert get(graphs, 0) is before
    for change in (lambda: setattr(weight, "data", weight.data.clone()), lambda: weight.requires_grad_(False)):
        change()
        after = get(graphs, 0)
        assert after is not before
        assert graphs.shared is None
        assert graphs.pool is not pool
        before, pool = after, graphs.pool
        assert get(graphs, 0) is before


def test_a_failed_capture_is_the_last(graphs, caplog):
    get(graphs, 0)

    def fails():
        raise ValueError("grad requires non-empty inputs.")

    assert graphs.get(1, fails, torch.device("cpu")) is None
    assert "This forward can't be a CUDA graph: grad requires" in caplog.text
    assert get(graphs, 0) is None
    assert graphs.pool is None


def test_short_memory_is_no_failed_capture(graphs):
    def short():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        graphs.get(0, short, torch.device("cpu"))
    assert graphs.enabled
