"""The divergence from the k likeliest tokens of a teacher with another tokenizer: against the whole distribution at k = all, and
against its definition, a position at a time, in float64."""

import pytest
import torch
import torch.nn.functional as F
from test_crossed import language
from torch import nn

from gkd.losses.crossed import ClassMaps, CrossedTarget, Spans
from gkd.losses.crossed_topk import CrossedTopK
from gkd.losses.divergences import jsd
from gkd.losses.objective import distillation_loss
from gkd.losses.skew import SkewKL
from gkd.losses.targets import HiddenTarget
from gkd.losses.topk import TopK
from gkd.losses.total_variation import TotalVariation
from gkd.models.heads import LogitHead

SIZES, CLASSES = (31, 43), 9
# The student's and the teacher's tokens of each span; of the last one the end is not known.
SHAPES = [(1, 1), (2, 1), (1, 2), (3, 2), (1, 3), (2, 3), (1, 2), (4, 4), (3, 1), (1, 2), (2, 1), (2, 0)]
DIVERGENCES = [*map(jsd, (0.0, 0.5, 1.0)), SkewKL(0.1), TotalVariation()]
HEAD = LogitHead(nn.Identity(), 1.0, None)


def classes_of(size, generator, left_out):
    """Each class has a member, the first many; `left_out` ids have none."""
    rest = torch.randint(0, CLASSES, (size - CLASSES - left_out,), generator=generator)
    rest[: len(rest) // 2] = 0
    of = torch.cat([torch.arange(CLASSES), rest, torch.full((left_out,), -1)])
    return of[torch.randperm(size, generator=generator)]


def case(seed=3, left_out=3):
    """The logits of both, (N, 31) and (M, 43), spans and maps."""
    generator = torch.Generator().manual_seed(seed)
    starts = [sum(other for _, other in SHAPES[:i]) for i in range(len(SHAPES))]
    of_token = [i for i, (length, _) in enumerate(SHAPES) for _ in range(length)]
    aligned = torch.tensor([i == 0 or of_token[i] != of_token[i - 1] for i in range(len(of_token))])
    counts = len(of_token), starts[-1] + 1
    logits = [
        2 * torch.randn(n, s, generator=generator, dtype=torch.float64) for n, s in zip(counts, SIZES, strict=True)
    ]
    labels, following = (torch.randint(0, s, (n,), generator=generator) for s, n in zip(SIZES, counts, strict=True))
    lengths = torch.tensor([SHAPES[i][1] for i in of_token], dtype=torch.int16)
    lacking = torch.rand(SIZES[0], generator=generator) < 0.9
    maps = ClassMaps(*(classes_of(size, generator, left_out) for size in SIZES), CLASSES, lacking)
    spans = Spans(labels, torch.tensor([starts[i] for i in of_token]), following, aligned, lengths)
    return *logits, spans, maps


def known(teacher, spans, maps, k, temperature=1.0):
    own = TopK.of_logits(teacher, k, temperature, spans.following)
    return CrossedTopK(CrossedTopK.known_at(own, spans, maps), maps, spans.labels, spans.aligned)


def compared(student, target, labels, **options):
    """The statistics of each position, and the gradient to the student's logits."""
    hidden = student.clone().requires_grad_()
    loss, statistics = distillation_loss(hidden, target, labels, HEAD, None, SIZES[0], **options)
    return statistics, torch.autograd.grad(loss, hidden)[0]


def two(log_prob):
    """A token and any other."""
    return torch.stack([log_prob, torch.log1p(-log_prob.exp())])


def values_of(student, teacher, spans, maps, k, divergence, temperature):
    """The divergence of each position, (N,), from the definition. Also how many are told of inside of spans and at whole ones."""
    p, q = ((logits / temperature).softmax(-1) for logits in (student, teacher))
    values, told = [p.new_zeros(())] * len(p), [0, 0]
    starts = spans.aligned.nonzero()[:, 0].tolist()

    def bucket(probs, classes, c):
        return probs[classes == c].sum()

    for start, end in zip(starts, [*starts[1:], len(p)], strict=True):
        at, length, label = int(spans.at[start]), int(spans.lengths[start]), spans.labels[start]
        top, of_class = q[at].topk(k).indices, maps.teacher_classes
        support = sorted({c for c in of_class[top].tolist() if c >= 0})
        tail = q[at].sum() - q[at][top].sum() if k < SIZES[1] else q.new_zeros(())
        ours = [bucket(p[start], maps.student_classes, c) for c in support]
        rest = p[start][maps.student_classes >= 0].sum() - sum(ours)
        theirs = [bucket(q[at][top], of_class[top], c) for c in support]
        both = [torch.stack([*ours, rest]), torch.stack([*theirs, tail])]
        if len(support) == CLASSES:
            both = [side[:-1] for side in both]  # nothing is left
        both = [(side / side.sum()).log()[None] for side in both]
        values[start] = divergence.value(*both)[0]
        if not length:
            continue
        whole = sum(q[at + j, spans.following[at + j]].log() for j in range(length))
        own = maps.student_classes[label]
        # What is known of the class of the student's first token: the k, and the token that follows.
        seen = torch.cat([top, spans.following[at : at + 1]]).unique()
        mass = bucket(q[at][seen], of_class[seen], own) if own >= 0 else q.new_zeros(())
        if mass < tail or mass == 0:
            continue
        of_first = (mass / (1 - q[at][top][of_class[top] < 0].sum())).log()
        for i in range(start + 1, end):
            each = ((whole - of_first) / (end - start - 1)).clamp(max=-1e-6)
            values[i] = divergence.value(two(p[i, spans.labels[i]].log())[None], two(each)[None])[0]
            told[0] += 1
        if end == start + 1 and length > 1 and maps.lacking[label]:
            share = (whole - of_first).clamp(max=-1e-6)
            own_share = (p[start, label] / bucket(p[start], maps.student_classes, own)).log()
            values[start] = values[start] + divergence.value(two(own_share)[None], two(share)[None])[0]
            told[1] += 1
    return torch.stack(values), told


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize(("temperature", "kd_ratio"), [(1.0, 1.0), (1.5, 0.3)])
def test_all_ids_are_the_whole_distribution(divergence, temperature, kd_ratio):
    """In float64 to rounding: losses, KLs, entropies, agreement and the gradient."""
    student, teacher, spans, maps = case()
    options = {"divergence": divergence, "temperature": temperature, "kd_ratio": kd_ratio}
    exact, wanted = compared(student, CrossedTarget(HiddenTarget(teacher, HEAD), maps, spans), spans.labels, **options)
    found, grad = compared(student, known(teacher, spans, maps, SIZES[1], temperature), spans.labels, **options)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, wanted, rtol=1e-8, atol=1e-9)
    assert (exact[0] > 1e-4).sum() >= 15


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("k", [1, 4, 15, SIZES[1] - 1, SIZES[1]])
@pytest.mark.parametrize(("temperature", "kd_ratio"), [(1.0, 1.0), (1.5, 0.3)])
def test_the_loss_and_its_gradient_are_autograds_of_the_definition(divergence, k, temperature, kd_ratio):
    student, teacher, spans, maps = case()
    target = known(teacher, spans, maps, k, temperature)
    options = {"divergence": divergence, "temperature": temperature, "kd_ratio": kd_ratio}
    found, grad = compared(student, target, spans.labels, **options)
    student.requires_grad_()
    values, told = values_of(student, teacher, spans, maps, k, divergence, temperature)
    expected = kd_ratio * values + (1 - kd_ratio) * F.cross_entropy(student, spans.labels, reduction="none")
    torch.testing.assert_close(found[0], expected.detach(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), student)[0], rtol=1e-6, atol=1e-8)
    spelled = target.spelled(9, temperature)
    assert [int(spelled.inside.sum()), int(spelled.whole.sum())] == told
    if k >= 15:
        assert min(told) >= 2
    narrow, narrow_grad = compared(student.detach().float(), target, spans.labels, **options)
    torch.testing.assert_close(narrow[0].double(), found[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(narrow_grad.double(), grad, rtol=1e-3, atol=1e-5)


def test_classes_are_merged_in_falling_order():
    """Of a teacher's five likeliest ids, in classes 0, 1, 0, 2 and none; in the second row the last is the likeliest."""
    class_of = torch.tensor([0, 1, 0, 2, -1, 1, 3])
    probs = torch.tensor([[0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.05], [0.022, 0.021, 0.02, 0.019, 0.9, 0.01, 0.008]])
    merged = TopK.of_logits(probs.log(), 5).merged(class_of, 4)
    assert merged.ids[:, :3].tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(merged.log_probs[:, :3].exp(), torch.tensor([[0.45, 0.2, 0.12], [0.042, 0.021, 0.019]]))
    assert merged.void.tolist() == [[False, False, False, True, True]] * 2
    torch.testing.assert_close(merged.tail.exp(), torch.tensor([0.13, 0.018]))
    assert (TopK.of_logits(probs.log(), 5).merged(class_of, 3).tail == -torch.inf).all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_a_teacher_whose_likeliest_are_all_left_out_says_nothing(divergence):
    maps = case()[3]
    maps.teacher_classes[5] = -1
    teacher = torch.zeros(4, SIZES[1]).index_fill_(1, torch.tensor([5]), 9.0)
    student = torch.randn(4, SIZES[0], generator=torch.Generator().manual_seed(0))
    merged = TopK.of_logits(teacher, 1).merged(maps.teacher_classes, CLASSES)
    found, grad = merged.statistics_and_gradient(maps.student.sums(student), torch.zeros(4), divergence)
    assert found.loss.abs().max() < 1e-6
    assert grad.abs().max() < 1e-6


def test_where_the_teacher_has_read_no_further_nothing_is_compared():
    student, teacher, spans, maps = case()
    read = int(spans.at[-4])  # up to the beginning of the third span from the end
    cut = spans.at >= read
    spans.at[cut], spans.aligned[cut], spans.lengths[cut] = read, False, 0
    spans.following, teacher = spans.following[:read], teacher[:read]
    found, grad = compared(student, known(teacher, spans, maps, 4), spans.labels, divergence=jsd(0.5))
    assert cut.sum() == 4
    assert not found[:, cut].any()
    assert not grad[cut].any()
    assert (found[0, spans.aligned] > 0).all()


@pytest.mark.parametrize("k", [1, 4, 15])
def test_in_a_caches_dtypes_it_is_near(k):
    """float16 rounds log-probabilities by at most 2^-11 of them, so a loss of nats by about a thousandth."""
    student, teacher, spans, maps = case()
    own = TopK.of_logits(teacher, k, 1.0, spans.following)
    targets = [CrossedTopK.known_at(of, spans, maps) for of in (own, own.stored())]
    assert [target.following.dtype for target in targets] == [torch.float64, torch.float32]
    targets = [CrossedTopK(of, maps, spans.labels, spans.aligned) for of in targets]
    exact, near = (compared(student, target, spans.labels, divergence=jsd(0.5))[0][0] for target in targets)
    torch.testing.assert_close(near, exact, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize(("beta", "most"), [(0.0, 0.15), (0.5, 0.22), (1.0, 0.35)])
def test_the_gradient_lacks_about_as_much_as_the_tail_at_beta_0(beta, most):
    """Of 16 of the teacher's 34 tokens of a tiny language, which have nine tenths of its probability. Later β lose more."""
    labels, differences = torch.zeros(4, dtype=torch.long), []
    for seed in range(8):
        _, law, logits, maps = language("student", seed)
        aligned, lengths = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.int16)
        spans = Spans(labels, torch.arange(4), labels, aligned, lengths)
        top = CrossedTopK(
            CrossedTopK.known_at(TopK.of_logits(law.log(), 16, 1.0, labels), spans, maps), maps, labels, aligned
        )
        losses, grads = [], []
        for target in (CrossedTarget(HiddenTarget(law.log(), HEAD), maps, spans), top):
            hidden = logits.clone().requires_grad_()
            loss, _ = distillation_loss(hidden, target, labels, HEAD, None, logits.shape[1], beta)
            losses.append(loss.item())
            grads.append(torch.autograd.grad(loss, hidden)[0])
        assert 0.7 * losses[0] < losses[1] < losses[0]
        differences.append(((grads[1] - grads[0]).norm() / grads[0].norm()).item())
    assert sum(differences) / 8 < most, differences
