"""A teacher reads several micro-batches in one forward: the same hidden states, little padding, within a bound."""

from types import SimpleNamespace

import pytest
import torch
from tiny import make_model

from gkd.data.batch import Batch, scored_positions
from gkd.models.heads import hidden_at_scored, last_hidden_states
from gkd.teachers.ahead import MOST_TOGETHER, STATES_SHARE, joined, read_together
from gkd.teachers.placed import OffloadedTeacher


def batch(rows, width, masked=False):
    ids = torch.randint(3, 264, (rows, width))
    labels = torch.where(torch.arange(width) > width // 2, ids, -100)
    return Batch(ids, labels, scored_positions(labels), torch.ones_like(ids) if masked else None)


def test_neighbours_of_like_length_are_read_together_within_the_bound():
    shapes = [(2, 1000), (2, 990), (20, 700), (4, 690), (1, 100), (10, 90), (1, 2000)]
    forwards = read_together([batch(*shape) for shape in shapes])
    assert (
        [[tuple(b.input_ids.shape) for b in together] for together in forwards]
        == [
            shapes[:2],  # twenty more of 700 would not fit
            shapes[2:3],  # nor four of 690 to twenty
            shapes[3:5],
            shapes[5:6],  # no padding of 6,000 tokens to save a forward
            shapes[6:],
        ]
    )
    huge = [batch(1, MOST_TOGETHER + 1), batch(1, 5)]
    assert read_together(huge) == [[part] for part in huge]
    assert read_together([]) == []


@pytest.mark.parametrize("masks", [(False, False), (True, True), (False, True)])
def test_joined_batches_have_the_states_of_each(masks):
    torch.manual_seed(0)
    model = make_model(0).double().eval()
    parts = [batch(2, 9, masks[0]), batch(1, 5, masks[1]), batch(3, 7, masks[0])]
    if masks[1]:
        parts[1].attention_mask[0, 0] = 0  # padding on the left
    inputs, whole = [part.teacher_inputs for part in parts], joined(parts, pad=0)
    assert (whole.attention_mask is not None) == any(masks)
    with torch.no_grad():
        alone, together = (
            torch.cat([hidden_at_scored(lambda *a: last_hidden_states(model, *a), *each) for each in every])
            for every in (inputs, [whole.teacher_inputs])
        )
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    assert whole.lengths is None
    for part in parts:
        part.lengths = torch.full((part.rows,), part.input_ids.shape[1])
    assert joined(parts, pad=0).lengths.tolist() == [9, 9, 5, 7, 7, 7]


def test_hidden_states_beyond_the_bound_wait_in_cpu_memory(monkeypatch):
    """The CPU stands for both places here: which of them asked for a copy is seen."""
    moved = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(len(self)) or self)
    accelerator = SimpleNamespace(device=torch.device("cpu"), unwrap_model=lambda model: model)
    teacher = OffloadedTeacher(make_model(1).eval(), accelerator, 0, False)
    batches = [batch(rows, 8) for rows in (3, 2, 1)]
    sizes = [len(part.scored) for part in batches]
    room = sum(sizes[:2]) * 32 * 4
    monkeypatch.setattr("gkd.teachers.placed.device_memory", lambda device: (room + 1) / STATES_SHARE)
    moved.clear()
    teacher.prepare(batches)
    assert moved == sizes[2:]
    again = [batch(1, 8)]
    teacher.prepare(again)
    assert all(part.teacher_output is None for part in batches)  # a step's states end with it
    assert again[0].teacher_output.shape == (len(again[0].scored), 32)
