"""GOLD's loss on a teacher with another tokenizer: against its definition in float64, and against TRL's own."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from trl.experimental.gold.gold_trainer import ULDLoss

from gkd.losses.crossed import ClassMaps, Spans
from gkd.losses.divergences import jsd
from gkd.losses.objective import Objective, distillation_loss
from gkd.losses.targets import HiddenTarget
from gkd.losses.uld import UldTarget, hybrid_loss, sorted_distance
from gkd.models.heads import LogitHead

SIZES, SHARED = (31, 43), 12
# Student's and teacher's tokens of each span, by row.
SHAPES = [[(1, 1), (2, 1), (1, 2), (3, 2), (1, 3)], [(2, 3), (1, 2), (4, 4), (3, 1), (1, 1), (1, 1), (1, 2)]]


def reference(logits, teacher_logits, labels, following, shapes, matched, beta, temperature):
    """The loss of each span of a row: probabilities by name, and by rank in lists of one length."""
    p, q = ((of / temperature).softmax(-1) for of in (logits, teacher_logits))
    losses, i, j = [], 0, 0
    for length, length_of_teacher in shapes:
        merged = []
        for side, start, count, tokens in ((p, i, length, labels), (q, j, length_of_teacher, following)):
            merged.append(side[start + count - 1])
            for k in range(start, start + count - 1):
                merged[-1] = merged[-1] * side[k, tokens[k]]
        i, j = i + length, j + length_of_teacher
        common = [side[ids].clamp(min=1e-8) for side, ids in zip(merged, matched, strict=True)]
        by_name = jsd(beta).value(*(side.log()[None] for side in common))[0]
        alone = []
        for side, ids in zip(merged, matched, strict=True):
            rest = [side[index] for index in range(len(side)) if index not in ids.tolist()]
            rest = sorted(rest, key=lambda value: -value.item()) + [side.new_zeros(())] * max(SIZES)
            alone.append(torch.stack(rest[: max(SIZES)]))
        weight = len(matched[0]) / SIZES[1]
        losses.append(weight * by_name + (1 - weight) * (alone[0] - alone[1]).abs().sum())
    return torch.stack(losses)


def pair(shapes, seed=0):
    """States, next tokens and heads of both sides of some rows, and how they align."""
    generator = torch.Generator().manual_seed(seed)
    counts = [sum(span[side] for row in shapes for span in row) for side in (0, 1)]
    states = [torch.randn(count, 6, generator=generator, dtype=torch.float64) for count in counts]
    labels, following = (torch.randint(0, s, (n,), generator=generator) for s, n in zip(SIZES, counts, strict=True))
    heads = [torch.nn.Linear(6, size, bias=False, dtype=torch.float64) for size in SIZES]
    for head in heads:
        head.weight.data = torch.randn(head.weight.shape, generator=generator, dtype=torch.float64)
    spans = [span for row in shapes for span in row]
    at, aligned, lengths, start = [], [], [], 0
    for length, of_teacher in spans:
        at += [start] * length
        aligned += [place == 0 for place in range(length)]
        lengths += [of_teacher] * length
        start += of_teacher
    aligned, lengths = torch.tensor(aligned), torch.tensor(lengths, dtype=torch.int16)
    matched = torch.stack([torch.randperm(size, generator=generator)[:SHARED] for size in SIZES])
    maps = ClassMaps(*(torch.arange(size) % 7 for size in SIZES), 7, torch.zeros(SIZES[0], dtype=torch.bool))
    teacher = HiddenTarget(states[1], LogitHead(heads[1], 1.0, None))
    target = UldTarget(teacher, maps, Spans(labels, torch.tensor(at), following, aligned, lengths), matched)
    return target, states[0], LogitHead(heads[0], 1.0, None)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("temperature", "kd_ratio"), [(1.0, 1.0), (1.7, 0.6)])
@pytest.mark.parametrize("rows", [5, 100])
def test_the_loss_and_its_gradient_are_those_of_the_definition(monkeypatch, beta, temperature, kd_ratio, rows):
    """Whatever the chunks: none cuts a span."""
    monkeypatch.setattr("gkd.losses.objective._chunk_rows", lambda *_, **__: rows)
    shapes = SHAPES[0] + SHAPES[1]
    target, student, head = pair([shapes])
    student.requires_grad_()
    labels = target.spans.labels
    options = {"beta": beta, "temperature": temperature, "kd_ratio": kd_ratio, "head_params": (head.head.weight,)}
    loss, statistics = distillation_loss(student, target, labels, head, None, SIZES[0], **options)
    grads = torch.autograd.grad(loss, [student, head.head.weight])
    logits = student @ head.head.weight.T
    of_teacher = (target.teacher.hidden @ target.teacher.head.head.weight.T).detach()
    spans = reference(logits, of_teacher, labels, target.spans.following, shapes, target.matched, beta, temperature)
    expected = kd_ratio * spans.sum() + (1 - kd_ratio) * F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(statistics[0].sum(), expected.detach(), rtol=1e-9, atol=1e-9)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, [student, head.head.weight]), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-8, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(
            distillation_loss(student, target, labels, head, None, SIZES[0], **options)[0], expected
        )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_loss_is_trls(beta):
    """Theirs is an average over the spans of a row, then over rows. Each token ends at a byte that the shapes tell."""
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=1.3, uld_teacher_temperature=1.3,
        uld_skip_student_eos=False, uld_skip_teacher_eos=False, use_extended_uld=True, uld_use_hybrid_loss=True, beta=beta,
        uld_token_merge_strategy="bayesian",
    )  # fmt: skip
    for seed, shapes in enumerate(SHAPES):
        target, student, head = pair([shapes], seed)
        matched = target.matched.tolist()
        names = [{f"common {i}": index for i, index in enumerate(ids)} for ids in matched]
        for own, ids, size, side in zip(names, matched, SIZES, "st", strict=True):
            own |= {f"{side} {index}": index for index in range(size) if index not in ids}
        trls = ULDLoss(config, *(SimpleNamespace(get_vocab=lambda own=own: own) for own in names))
        ends = [[], []]
        for number, span in enumerate(shapes):
            for side, length in enumerate(span):
                ends[side] += [100 * number + side + 2 * place for place in range(1, length)] + [100 * number + 100]
        student.requires_grad_()
        logits = student @ head.head.weight.T
        of_teacher = target.teacher.hidden @ target.teacher.head.head.weight.T
        tokens = target.spans.labels, target.spans.following
        ids = [F.pad(of, (1, 0))[None] for of in tokens]  # behind one token of a prompt
        labels = [F.pad(of, (1, 0), value=-100)[None] for of in tokens]
        offsets = [torch.tensor([[0, 0], *([0, end] for end in of)])[None] for of in ends]
        logits_of = (F.pad(of, (0, 0, 0, 1))[None] for of in (logits, of_teacher))
        theirs = trls(*logits_of, *labels, *ids, *offsets)
        (expected,) = torch.autograd.grad(theirs, student)
        options = {"beta": beta, "temperature": 1.3}
        loss, _ = distillation_loss(student, target, tokens[0], head, None, SIZES[0], **options)
        (gradient,) = torch.autograd.grad(loss / len(shapes), student)
        torch.testing.assert_close(loss / len(shapes), theirs, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
        assert expected.abs().max() > 1e-3


def test_lists_of_two_lengths_are_compared_by_rank():
    student, teacher = torch.tensor([[0.1, 0.5, 0.2]]), torch.tensor([[0.3, 0.4]])
    for pair in ((student, teacher), (teacher, student)):
        assert sorted_distance(*pair).item() == pytest.approx(abs(0.5 - 0.4) + abs(0.2 - 0.3) + 0.1)
    assert sorted_distance(student, teacher[:, :0]).tolist() == [0.0]


def test_equal_distributions_of_one_vocabulary_have_no_loss():
    log_probs = torch.randn(3, 9, dtype=torch.float64).log_softmax(-1)
    everything = torch.arange(9).expand(2, 9)
    torch.testing.assert_close(
        hybrid_loss(log_probs, log_probs, everything[:, :4], jsd(0.5)), torch.zeros(3, dtype=torch.float64)
    )
    other = torch.randn(3, 9, dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(hybrid_loss(log_probs, other, everything, jsd(0.5)), jsd(0.5).value(log_probs, other))


def test_a_span_without_an_end_or_longer_than_a_chunk_is_left_out(monkeypatch):
    monkeypatch.setattr("gkd.losses.objective._chunk_rows", lambda *_, **__: 4)
    target, student, head = pair([[(1, 1), (6, 2), (2, 1), (3, 3)]])
    target.spans.lengths[-3:] = 0
    parts = [range(part.start, part.stop) for part in target.parts(4)]
    assert [place for part in parts for place in part] == list(range(12))
    assert max(map(len, parts)) <= 4
    _, statistics = distillation_loss(student, target, target.spans.labels, head, None, SIZES[0])
    assert statistics[0].nonzero()[:, 0].tolist() == [0, 8]


def test_an_evaluation_measures_classes():
    target, student, head = pair(SHAPES)
    measured = Objective(jsd(0.5), SIZES[0]).measure(student, target, target.spans.labels, head)
    assert (measured[1] > 0).tolist() == target.spans.aligned.tolist()
