"""A step's rows in micro-batches of like length: nothing is lost or mixed up, little is padded, and the gradient is the same."""

import random
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import make_model
from trainers import losses, tiny_trainer

from gkd.data.batch import training_batch
from gkd.losses.topk import TopK
from gkd.models import packing
from gkd.rollout.grouping import StepRows, cut, share
from gkd.rollout.steps import TextWriter
from gkd.training.trainer import GKDTrainer


def size(lengths, group):
    return len(group) * max(lengths[row] for row in group)


@pytest.mark.parametrize("seed", range(20))
def test_each_row_is_in_one_group_within_the_budget(seed):
    draw = random.Random(seed)
    for _ in range(20):
        lengths = [draw.randint(1, draw.choice([3, 50, 2000])) for _ in range(draw.randint(1, 30))]
        most, at_least = draw.choice([1, 40, 500, 10**6]), draw.randint(1, 40)
        groups = cut(lengths, most, at_least=at_least)
        assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
        assert all(size(lengths, group) <= most or len(group) == 1 for group in groups)
        assert len(groups) >= min(at_least, len(lengths))
        assert [lengths[group[0]] for group in groups] == [max(lengths[row] for row in group) for group in groups]
        if len(cut(lengths, most)) <= at_least:  # no more than it takes
            assert len(groups) == min(at_least, len(lengths))


@pytest.mark.parametrize("seed", range(10))
def test_no_cut_of_the_sorted_rows_costs_less(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 900) for _ in range(9)]
    most, order = draw.choice([1000, 2500, 5000]), sorted(range(9), key=lambda row: -lengths[row])

    def cost(groups):
        return sum(size(lengths, group) + 512 for group in groups)

    every = []
    for count in range(9):
        for ends in combinations(range(1, 9), count):
            groups = [order[a:b] for a, b in zip((0, *ends), (*ends, 9), strict=True)]
            if all(size(lengths, group) <= most or len(group) == 1 for group in groups):
                every.append(cost(groups))
    assert cost(cut(lengths, most)) == min(every)


def test_little_is_padding():
    """64 texts that end anywhere, after prompts of 256 tokens: in 8 batches of 8 as they come, 40 % is padding."""
    draw, shares = np.random.default_rng(0), []
    for _ in range(20):
        lengths = (256 + np.minimum(draw.geometric(1 / 300, 64), 1024)).tolist()
        shares.append(1 - sum(lengths) / sum(size(lengths, group) for group in cut(lengths, 8 * 1280)))
    assert np.mean(shares) < 0.07


@pytest.mark.parametrize("most_rows", [None, 3])
def test_rows_without_padding_are_shared_evenly(most_rows):
    draw = np.random.default_rng(0)
    for rows in (1, 2, 7, 64):
        for at_least in (1, 3):
            lengths = (6 + np.minimum(draw.geometric(1 / 30, rows), 100)).tolist()
            groups = share(lengths, 400, at_least=at_least, most_rows=most_rows)
            assert sorted(row for group in groups for row in group) == list(range(rows))
            sizes = [sum(lengths[row] for row in group) for group in groups]
            assert max(sizes) <= 400
            assert max(map(len, groups)) <= (most_rows or rows)
            fewest = max(-(-sum(lengths) // 400), -(-rows // (most_rows or rows)), at_least)
            assert len(groups) in (min(fewest, rows), min(fewest + 1, rows))
            if rows == 64 and most_rows is None:
                assert max(sizes) < 1.05 * np.mean(sizes)
    assert share([500, 3], 400) == [[0], [1]]  # a row that is too long stands alone


@pytest.mark.parametrize("divide", [cut, share])
def test_groups_are_as_many_as_other_ranks_have(divide):
    """A rank that made more than it was asked for, or fewer, would leave the others waiting."""
    draw = random.Random(0)
    for _ in range(1000):
        lengths = [draw.randint(1, draw.choice([5, 30, 100])) for _ in range(draw.randint(1, 14))]
        limits = {"most_tokens": max(lengths) + draw.randint(0, 100), "most_rows": draw.choice([None, 1, 2, 3, 4])}
        fewest = len(divide(lengths, **limits))
        for at_least in range(fewest, len(lengths) + 3):
            groups = divide(lengths, **limits, at_least=at_least)
            assert len(groups) == min(at_least, len(lengths))
            assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
            assert max(map(len, groups)) <= (limits["most_rows"] or len(lengths))
            if divide is share:
                assert max(sum(lengths[row] for row in group) for group in groups) <= limits["most_tokens"]


# ---------------------------------------------------------------------- batches


def made(draw, teacher):
    """Micro-batches of random prompts and texts, of which some are empty."""
    prompts, texts = (draw.randint(1, 9) for _ in range(2))
    rows = draw.randint(1, 5)
    masks = torch.zeros(rows, prompts, dtype=torch.long), torch.zeros(rows, texts, dtype=torch.long)
    for row in range(rows):
        masks[0][row, prompts - draw.randint(1, prompts) :] = 1
        masks[1][row, : draw.randint(min(row, 1), texts)] = 1
    prompts, texts = (torch.randint(5, 99, mask.shape) * mask for mask in masks)
    batch = training_batch(prompts, masks[0], texts, masks[1], pad=0)
    count = len(batch.scored)
    if teacher == "topk":
        batch.teacher_output = TopK(torch.randint(99, (count, 3)), torch.rand(count, 3), torch.rand(count))
    if teacher == "hidden":
        batch.teacher_output = torch.rand(count, 4)
    if teacher == "longer ids":  # two tokens more before each text
        width = batch.input_ids.shape[1]
        batch.teacher_input_ids = F.pad(batch.input_ids, (2, 3), value=7)
        batch.teacher_attention_mask = F.pad(F.pad(batch.attention_mask, (2, 0), value=1), (0, 3))
        batch.teacher_scored = batch.scored // width * (width + 5) + batch.scored % width + 2
    return batch


def described(batches):
    """Each row without padding, and what belongs to its scored tokens, in their order."""
    rows = []
    for batch in batches:
        for piece in batch.pieces(1):
            kept = piece.attention_mask[0].bool()
            row = [piece.input_ids[0][kept].tolist(), piece.labels[0][kept].tolist()]
            row.append(piece.labels.flatten()[piece.scored + 1].tolist())
            if piece.teacher_output is not None:
                output = piece.teacher_output
                row.append([part.tolist() for part in getattr(output, "tensors", [output])])
            if piece.teacher_input_ids is not None:
                row.append(piece.teacher_input_ids[0][piece.teacher_attention_mask[0].bool()].tolist())
                row.append(piece.teacher_input_ids.flatten()[piece.teacher_scored + 1].tolist())
            rows.append(row)
    return rows


@pytest.mark.parametrize("teacher", ["none", "topk", "hidden", "longer ids"])
def test_batches_keep_each_row_with_its_tokens(teacher):
    draw = random.Random(0)
    torch.manual_seed(0)
    for _ in range(40):
        batches = [made(draw, teacher) for _ in range(draw.randint(1, 4))]
        rows = StepRows(batches, pad=0)
        groups = cut(rows.lengths, draw.choice([5, 20, 40, 1000]), at_least=draw.randint(1, 6))
        found, before = rows.batches(groups), described(batches)
        for batch in found:  # lengths stand for the masks
            for prefix in ("", "teacher_") if teacher == "longer ids" else ("",):
                assert batch[prefix + "lengths"].device.type == "cpu"
                assert prefix + "attention_mask" not in batch
                columns = torch.arange(batch[prefix + "input_ids"].shape[1])
                setattr(batch, prefix + "attention_mask", (columns < batch[prefix + "lengths"][:, None]).long())
        assert described(found) == [before[row] for group in groups for row in group]
        for batch, group in zip(found, groups, strict=True):
            scored = F.pad(batch.labels[:, 1:] != -100, (0, 1)).flatten().nonzero()[:, 0]
            assert batch.scored.equal(scored)
            assert batch.input_ids.shape == (len(group), int(batch.attention_mask.sum(1).max()))
            extra = 2 if teacher == "longer ids" else 0
            assert [rows.lengths[row] for row in group] == (batch.attention_mask.sum(1) + extra).tolist()
            if extra:
                assert batch.teacher_input_ids.shape[1] == batch.input_ids.shape[1] + extra


def test_padding_on_the_left_is_seen():
    batch = made(random.Random(1), "none")
    batch.attention_mask = batch.attention_mask.flip(1)
    batch.attention_mask[0, 0] = 0
    (found,) = StepRows([batch], pad=0).batches([list(range(batch.rows))])
    assert found.attention_mask is not None
    assert found.lengths is None


# ---------------------------------------------------------------------- training

# Prompts and answers of 1 to 120 characters: 2 steps of 3 micro-batches of 2, of which the last has only 2.
TEXTS = [
    {"messages": [{"role": "user", "content": "a" * n + "?"}, {"role": "assistant", "content": "b" * m}]}
    for n, m in ((1, 1), (60, 120), (2, 5), (90, 3), (1, 40), (5, 5), (30, 100), (1, 1), (1, 2), (3, 60))
]


def trained(folder, **flags):
    """The trainer, its batches at each step, and the gradients."""
    seen = []

    class Watched(GKDTrainer):
        def _get_grad_norm(self, model, grad_norm=None):
            gradient = {name: p.grad.clone() for name, p in self.model.named_parameters()}
            seen.append((self.step.batches, gradient))
            return super()._get_grad_norm(model, grad_norm=grad_norm)

    options = {"gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 1, "max_new_tokens": 60}
    options |= {"max_length": 256, "include_num_input_tokens_seen": "all", "max_grad_norm": 1e9}
    trainer = tiny_trainer(folder, make_model(0), make_model(1), TEXTS, cls=Watched, **options | flags)
    trainer.train()
    return trainer, seen


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("lmbda", [0.0, 1.0], ids=["dataset", "own text"])
def test_loss_and_gradient_are_those_of_one_row_at_a_time(tmp_path, monkeypatch, lmbda, packed):
    with monkeypatch.context() as patch:
        if packed:  # as on a GPU
            patch.setattr(packing, "_DEVICES", ("cpu",))
        trainer, steps = trained(tmp_path / "grouped", lmbda=lmbda)
    assert trainer.student.packs == trainer.teacher.packs == packed
    monkeypatch.setattr(
        TextWriter, "_cut", lambda self, batches, *a: [piece for batch in batches for piece in batch.pieces(1)]
    )
    alone, steps_alone = trained(tmp_path / "alone", lmbda=lmbda)
    assert trainer.state.global_step == alone.state.global_step == 2
    assert [sum(batch.rows for batch in batches) for batches, _ in steps] == [6, 4]
    assert [len(batches) for batches, _ in steps_alone] == [6, 4]
    if not packed:
        assert all(len({batch.input_ids.shape[1] for batch in batches}) > 1 for batches, _ in steps)
    assert any(batch.rows > 2 for batches, _ in steps for batch in batches)  # more than the flag says
    for (_, gradient), (_, expected) in zip(steps, steps_alone, strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(gradient[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
    assert losses(trainer) == pytest.approx(losses(alone), rel=1e-5)
    source = "on_policy" if lmbda else "dataset"
    for mine, theirs in zip(trainer.state.log_history, alone.state.log_history, strict=True):
        for name in {f"{source}/{part}" for part in ("loss", "forward_kl", "completion_length")} & theirs.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_tokens_and_operations_are_those_of_the_batches(tmp_path):
    trainer, steps = trained(tmp_path)
    tokens = sum(batch.input_ids.numel() for batches, _ in steps for batch in batches)
    assert trainer.state.num_input_tokens_seen == tokens
    assert trainer.state.total_flos == 6 * tokens * trainer.model.num_parameters(exclude_embeddings=True)
    assert trainer.state.epoch == 1
