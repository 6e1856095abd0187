"""A step's rows dealt to the ranks: about the same number of tokens on each, no row lost or changed, and the same gradient."""

import random
import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rollout.test_grouping import described, made
from tiny import make_model

from gkd.data.batch import Batch, scored_positions
from gkd.losses.divergences import jsd
from gkd.models.heads import last_hidden_states
from gkd.rollout.dealing import deal, dealt_rows
from gkd.rollout.grouping import StepRows
from gkd.rollout.steps import TextWriter


def in_threads(ranks, work):
    """`work(accelerator)` of each rank, a thread each, whose accelerators gather as processes do."""
    barrier, slots, results, failures = threading.Barrier(ranks, timeout=60), [None] * ranks, [None] * ranks, []

    def run(rank):
        gathers = 0

        def gather(tensor):
            nonlocal gathers
            gathers += 1
            slots[rank] = tensor
            barrier.wait()
            assert len({part.shape for part in slots}) == 1, "a collective needs one shape on all ranks"
            every = torch.cat(slots)
            barrier.wait()
            return every

        device = torch.device("cpu")
        accelerator = SimpleNamespace(gather=gather, device=device, num_processes=ranks, process_index=rank)
        try:
            results[rank] = work(accelerator), gathers
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise next((error for error in failures if not isinstance(error, threading.BrokenBarrierError)), failures[0])
    assert len({gathers for _, gathers in results}) == 1
    return [result for result, _ in results]


# ---------------------------------------------------------------------- who gets which row


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_ranks_get_about_the_same_number_of_tokens(ranks):
    """Texts that end anywhere, 16 a rank, after prompts of 64: as they come the fullest rank has up to 1.9 times the mean."""
    draw, before, after = np.random.default_rng(ranks), [], []
    for _ in range(10):
        lengths = 64 + np.minimum(draw.geometric(1 / 300, 16 * ranks), 1024)
        for found, parts in ((before, np.split(lengths, ranks)), (after, [lengths[p] for p in deal(lengths, ranks)])):
            tokens = [part.sum() for part in parts]
            found.append(max(tokens) / np.mean(tokens))
    assert max(after) < 1.01
    assert np.mean(before) > 1.05


@pytest.mark.parametrize("seed", range(20))
def test_each_row_is_dealt_once(seed):
    draw = random.Random(seed)
    for _ in range(20):
        ranks, lengths = draw.randint(1, 9), [draw.randint(1, 900) for _ in range(draw.randint(1, 40))]
        dealt = deal(lengths, ranks)
        assert sorted(row for rows in dealt for row in rows) == list(range(len(lengths)))
        assert sum(map(bool, dealt)) == min(ranks, len(lengths))
        assert dealt == deal(np.array(lengths), ranks)
        tokens = [sum(lengths[row] for row in rows) for rows in dealt]
        assert max(tokens) - min(tokens) <= max(lengths)


# ---------------------------------------------------------------------- moving rows


def rows_of_rank(every, accelerator):
    own = every[accelerator.process_index]
    return dealt_rows(own, accelerator, max(own.lengths))


def rows_of_ranks(draw, ranks, teacher):
    """Of each rank; `teacher` reads "longer ids", "longer ids on rank 0" alone, or "longer ids" that are "unmasked"."""
    every = []
    for rank in range(ranks):
        longer = teacher != "none" and (rank == 0 or teacher != "longer ids on rank 0")
        batches = [made(draw, "longer ids" if longer else "none") for _ in range(draw.randint(1, 3))]
        for batch in batches if teacher == "unmasked" else []:
            batch.teacher_attention_mask = None
        every.append(StepRows(batches, pad=0))
    return every


def all_fields(whole, teacher):
    """Each row of a batch with what its teacher reads, if that is other than the student's on any rank."""
    if teacher != "none":
        ids, mask, scored = whole.teacher_inputs
        mask = torch.ones_like(ids) if mask is None else mask
        whole = replace(whole, teacher_input_ids=ids, teacher_attention_mask=mask, teacher_scored=scored)
    return described([whole])


@pytest.mark.parametrize("teacher", ["none", "longer ids", "longer ids on rank 0", "unmasked"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_move_with_their_tokens(ranks, teacher):
    draw, moved = random.Random(0), 0
    torch.manual_seed(0)
    for _ in range(15):
        before = rows_of_ranks(draw, ranks, teacher)
        after = in_threads(ranks, partial(rows_of_rank, before))
        if all(rows is own for (rows, _), own in zip(after, before, strict=True)):
            continue
        moved += 1
        after = [rows for rows, longest in after if longest == max(max(rows.lengths) for rows in before)]
        assert len(after) == ranks
        assert max(sum(rows.lengths) for rows in after) < max(sum(rows.lengths) for rows in before)
        found, expected = (
            sorted(row for rows in every for row in all_fields(rows.whole, teacher)) for every in (after, before)
        )
        assert found == expected
        for rows in after:
            assert rows.whole.scored.equal(scored_positions(rows.whole.labels))
    assert moved > 5


def test_rows_stay_where_the_teachers_output_is_known_or_little_is_gained():
    draw = random.Random(1)
    known = [[made(draw, "hidden") for _ in range(rank + 1)] for rank in range(2)]
    ids = torch.arange(5, 45)[None].expand(3, 40)
    even = [[Batch(ids, ids, scored_positions(ids), torch.ones_like(ids))] for _ in range(2)]
    for every in (known, even):
        own = [StepRows(batches, pad=0) for batches in every]
        after = in_threads(2, partial(rows_of_rank, own))
        assert all(rows is stayed for (rows, _), stayed in zip(after, own, strict=True))


# ---------------------------------------------------------------------- training


def text(lengths):
    """A micro-batch of rows of random ids, of which all but the first four are scored."""
    ids = torch.randint(5, 200, (len(lengths), max(lengths)))
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    labels = torch.where((mask > 0) & (torch.arange(ids.shape[1]) >= 4), ids, -100)
    return Batch(ids * mask, labels, scored_positions(labels), mask)


def gradient(student, teacher, batches, scale):
    """Of the summed divergence, times `scale`; and the sum."""
    student.zero_grad()
    total = 0.0
    for batch in batches:
        mine, theirs = (
            model.lm_head(last_hidden_states(model, batch.input_ids, batch.attention_mask).flatten(0, 1)[batch.scored])
            for model in (student, teacher)
        )
        loss = jsd(0.5).value(mine.log_softmax(-1), theirs.detach().log_softmax(-1)).sum() * scale
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in student.named_parameters()}


def cut_of_rank(every, accelerator, overhead, packs=False):
    """The micro-batches of a rank, of all ranks' rows as they come."""
    options = {"keep_mask": False, "max_length": None, "overhead": overhead}
    options |= {"packs": lambda: packs, "most_rows": lambda: None}
    writer = TextWriter(accelerator, None, None, {}, None, pad=0, cache=None, **options)
    return writer._cut(every[accelerator.process_index])


@pytest.mark.parametrize(
    ("ranks", "overhead", "packs"), [(2, 16, False), (8, 16, False), (8, 512, False), (2, 0, True), (8, 0, True)]
)
def test_loss_and_gradient_of_very_uneven_ranks_are_those_of_one(ranks, overhead, packs):
    """In float64, to 1e-10: each rank sums over its micro-batches, DDP averages over the ranks."""
    torch.manual_seed(0)
    draw, student, teacher = random.Random(ranks), make_model(0).double(), make_model(1).double()
    every = [[text([draw.randint(6, 12 + 20 * rank) for _ in range(3)]) for _ in range(2)] for rank in range(ranks)]
    count = sum(len(batch.scored) for batches in every for batch in batches)
    rows = [row for batches in every for batch in batches for row in batch.pieces(1)]
    alone = gradient(student, teacher, rows, 1 / count)
    dealt = in_threads(ranks, partial(cut_of_rank, every, overhead=overhead, packs=packs))
    assert len({len(batches) for batches in dealt}) == 1
    most = 3 * max(batch.input_ids.shape[1] for batches in every for batch in batches)
    for batch in (batch for batches in dealt for batch in batches):
        assert (int(batch.lengths.sum()) if packs else batch.input_ids.numel()) <= most
    before, tokens = ([sum(int((b.input_ids > 0).sum()) for b in part) for part in found] for found in (every, dealt))
    assert max(before) > 1.2 * np.mean(before)
    assert max(tokens) < 1.05 * np.mean(tokens)
    found = [gradient(student, teacher, batches, ranks / count) for batches in dealt]
    assert np.mean([loss for loss, _ in found]) == pytest.approx(alone[0], rel=1e-10)
    for name, expected in alone[1].items():
        mean = sum(grads[name] for _, grads in found) / ranks
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-10 * float(expected.abs().max()), msg=name)


def test_rows_go_back_where_a_rank_has_too_few_for_the_others_micro_batches():
    """The longest row balances three, which are too many tokens for one micro-batch: it can't be cut in two."""
    every = [[text([100]), text([30])], [text([35]), text([35])]]
    assert sorted(map(len, deal([100, 30, 35, 35], 2))) == [1, 3]
    after = in_threads(2, partial(cut_of_rank, every, overhead=16))
    for batches, own in zip(after, every, strict=True):
        assert [batch.rows for batch in batches] == [1, 1]
        assert all(batch.input_ids.equal(row.input_ids) for batch, row in zip(batches, own, strict=True))
