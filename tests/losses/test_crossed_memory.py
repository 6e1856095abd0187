"""The comparison with a teacher that has another tokenizer holds a chunk of logits at a time."""

import weakref

import pytest
import torch
from test_crossed import random_classes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gkd.losses.crossed import ClassMaps, CrossedTarget, Spans
from gkd.losses.objective import distillation_loss
from gkd.losses.projection import CHUNK_BYTES
from gkd.losses.targets import HiddenTarget
from gkd.losses.uld import UldTarget
from gkd.models.heads import LogitHead


class Memory(TorchDispatchMode):
    """The most bytes of tensors that operations have made and that live at a time."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage):
        key, size = id(storage), storage.nbytes()
        if key not in self.live:
            self.live[key] = weakref.ref(storage, lambda _: self._free(key, size))
            self.now += size
            self.most = max(self.most, self.now)

    def _free(self, key, size):
        self.now -= size
        del self.live[key]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("loss", ["shared", "uld"])
def test_no_copy_of_all_logits_exists_at_once(monkeypatch, loss, beta):
    """All copies of a chunk's logits, of both sides, keep to the room for a chunk; those of all positions take six times as
    much for each side alone."""
    room = 4 * 2**20
    monkeypatch.setitem(CHUNK_BYTES, "cpu", room)
    generator = torch.Generator().manual_seed(0)
    sizes, tokens, width = (4000, 6000), 1600, 4
    lengths = torch.randint(1, 4, (tokens,), generator=generator)
    aligned = torch.rand(tokens, generator=generator) < 0.7
    aligned[0] = True
    span = aligned.cumsum(0) - 1
    lengths = lengths[: span[-1] + 1]  # the teacher's tokens of each span
    starts, count = lengths.cumsum(0) - lengths, int(lengths.sum())
    labels, following = (
        torch.randint(0, size, (n,), generator=generator) for size, n in zip(sizes, (tokens, count), strict=True)
    )
    spans = Spans(labels, starts[span], following, aligned, lengths[span].short())
    classes_of = [random_classes(size, 3000, generator) for size in sizes]
    maps = ClassMaps(*classes_of, 3000, torch.rand(sizes[0], generator=generator) < 0.3)
    assert maps.student.size == sizes[0]
    assert maps.teacher.size == sizes[1]
    heads = [LogitHead(torch.nn.Linear(width, size, bias=False), 1.0, None) for size in sizes]
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    teacher = HiddenTarget(torch.randn(count, width, generator=generator), heads[1])
    matched = torch.stack([torch.randperm(size, generator=generator)[:2000] for size in sizes])
    target = CrossedTarget(teacher, maps, spans) if loss == "shared" else UldTarget(teacher, maps, spans, matched)
    with Memory() as memory:
        distillation_loss(hidden, target, labels, heads[0], None, sizes[0], beta)
    assert 4 * tokens * sizes[0] > 6 * room
    assert room / 4 < memory.most < room + 64 * tokens  # beside logits a few numbers of each position
