"""A micro-batch: how it is split, how transformers reads it, and which of its fields a checkpoint keeps."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gkd.data.batch import Batch, Source, scored_positions
from gkd.losses.topk import TopK
from gkd.rollout.steps import load_pending, save_pending

LABELS = torch.tensor([[-100, 5, 6, -100], [-100, -100, -100, -100], [-100, -100, 7, 8]])
TEACHER_LABELS = torch.tensor(
    [[-100, -100, -100, 5, 6], [-100] * 5, [-100, 7, 8, -100, -100]]
)  # more context, or less


def batch(**more):
    return Batch(torch.arange(12).view(3, 4), LABELS, scored_positions(LABELS), **more)


def test_pieces_are_cut_where_their_scored_tokens_are():
    teacher_ids = torch.arange(20, 35).view(3, 5)
    known = TopK(torch.arange(4)[:, None], torch.zeros(4, 1), torch.zeros(4))
    whole = batch(teacher_input_ids=teacher_ids, teacher_scored=scored_positions(TEACHER_LABELS), teacher_output=known)
    pieces = list(whole.pieces(1))
    assert [piece.rows for piece in pieces] == [1, 1, 1]
    assert [len(piece.scored) for piece in pieces] == [2, 0, 2]
    assert [piece.teacher_output.ids.flatten().tolist() for piece in pieces] == [[0, 1], [], [2, 3]]
    for piece, labels, teacher_labels in zip(pieces, LABELS, TEACHER_LABELS, strict=True):
        assert piece.scored.equal(scored_positions(labels[None]))
        ids, mask, scored = piece.teacher_inputs
        assert scored.equal(scored_positions(teacher_labels[None]))
        assert mask is None
        assert ids.shape == (1, 5)


def test_the_teacher_reads_what_the_student_reads_unless_it_has_ids_of_its_own():
    mask = torch.ones(3, 4)
    plain = batch(attention_mask=mask)
    assert all(a is b for a, b in zip(plain.teacher_inputs, (plain.input_ids, mask, plain.scored), strict=True))
    own = batch(attention_mask=mask, teacher_input_ids=LABELS, teacher_scored=plain.scored)
    assert own.teacher_inputs == (LABELS, None, plain.scored)  # the student's mask does not fit its ids


def test_a_field_that_is_none_is_not_there():
    plain = batch()
    assert list(plain) == ["input_ids", "labels", "scored"]
    assert len(plain) == 3
    assert "attention_mask" not in plain
    with pytest.raises(KeyError):
        plain["attention_mask"]
    assert plain["labels"] is LABELS
    assert list(plain.to("cpu")) == list(plain)


def test_pending_text_keeps_its_names_on_disk(tmp_path):
    """The pending text of an older checkpoint loads."""
    path = tmp_path / "pending_text/rank-0.safetensors"
    path.parent.mkdir()
    tensors = {"input_ids": torch.arange(12).view(3, 4), "labels": LABELS, "scored": scored_positions(LABELS)}
    told = {"source": "on_policy", "batches": 1, "completions": 3, "truncated": 1, "empty": 0}
    named = {f"7.0.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, path, metadata={"steps": json.dumps({"7": told}), "ranks": "2"})
    pending = load_pending(tmp_path, rank=0, ranks=2, device=torch.device("cpu"))
    text = pending[7]
    assert (text.source, text.completions, text.truncated, text.rows) == (Source.ON_POLICY, 3, 1, 3)
    assert all(text.batches[0][name].equal(tensor) for name, tensor in tensors.items())
    assert load_pending(tmp_path, rank=0, ranks=1, device=torch.device("cpu")) == {}
    save_pending(tmp_path / "again", pending, rank=0, ranks=2)
    with safe_open(tmp_path / "again/pending_text/rank-0.safetensors", "pt") as file:
        assert set(file.keys()) == set(named)
        assert json.loads(file.metadata()["steps"]) == {"7": told}


def test_scored_positions_predict_the_scored_tokens():
    labels = torch.tensor([[-100, -100, 5, 6, -100], [7, 8, -100, 9, 2]])
    found = scored_positions(labels)
    assert found.tolist() == [1, 2, 5, 7, 8]
    assert labels.flatten()[found + 1].tolist() == [5, 6, 8, 9, 2]
