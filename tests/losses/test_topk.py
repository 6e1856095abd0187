"""The divergence on the teacher's k likeliest tokens and the tail, against its definition with float64 autograd."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from gkd.losses.divergences import jsd, statistics_and_gradient
from gkd.losses.objective import distillation_loss
from gkd.losses.skew import SkewKL, SkewReverseKL
from gkd.losses.targets import HiddenTarget
from gkd.losses.topk import TopK
from gkd.losses.total_variation import TotalVariation
from gkd.models.heads import LogitHead

DIVERGENCES = [*(jsd(beta) for beta in (0.0, 0.1, 0.5, 1.0)), SkewKL(0.1), SkewReverseKL(0.1), TotalVariation()]
V = 29


def logits(n=6, vocab=V, seed=0):
    torch.manual_seed(seed)
    return (3 * torch.randn(n, vocab, dtype=torch.float64) for _ in range(2))


def coarsened(values, ids, temperature):
    """Log-probabilities (n, k) at ids, and the tail's (n, 1) if there is one, computed from probabilities."""
    p = torch.softmax(values / temperature, -1)
    top = p.gather(1, ids)
    rest = torch.ones_like(p).scatter(1, ids, 0.0)
    parts = [top, (p * rest).sum(1, keepdim=True)] if ids.shape[1] < values.shape[1] else [top]
    return torch.cat(parts, 1).log()


def naive(student, teacher, k, labels, divergence, temperature, kd_ratio):
    """The definition, by autograd."""
    ids = teacher.topk(k).indices
    value = divergence.value(*(coarsened(x, ids, temperature) for x in (student, teacher)))
    return kd_ratio * value + (1 - kd_ratio) * nn.functional.cross_entropy(student, labels, reduction="none")


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("k", [1, 5, V - 1, V])
@pytest.mark.parametrize(("temperature", "kd_ratio"), [(1.0, 1.0), (2.5, 1.0), (1.0, 0.3), (0.7, 0.3)])
def test_loss_and_gradient_equal_autograd_of_the_definition(divergence, k, temperature, kd_ratio):
    student, teacher = logits()
    labels = torch.randint(V, (6,))
    options = {"divergence": divergence, "temperature": temperature, "kd_ratio": kd_ratio}
    expected = naive(student.requires_grad_(), teacher, k, labels, **options)
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    known = TopK.of_logits(teacher, k, temperature)
    found, grad = known.statistics_and_gradient(student.detach(), labels, **options)
    torch.testing.assert_close(found.loss, expected.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grad, wanted, rtol=1e-8, atol=1e-11)
    narrow, narrow_grad = known.statistics_and_gradient(student.detach().float(), labels, **options)
    torch.testing.assert_close(narrow.loss.double(), found.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(narrow_grad.double(), grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_all_tokens_are_the_whole_divergence(divergence):
    student, teacher = logits()
    labels = torch.randint(V, (6,))
    expected, wanted = statistics_and_gradient(student, teacher, labels, divergence, 1.3, 0.4)
    found, grad = TopK.of_logits(teacher, V, 1.3).statistics_and_gradient(student, labels, divergence, 1.3, 0.4)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_a_lower_bound_that_grows_with_k(divergence):
    """The data processing inequality: joining buckets does not increase the divergence."""
    student, teacher = logits(n=40)
    labels = torch.zeros(40, dtype=torch.long)
    of_k = [
        TopK.of_logits(teacher, k).statistics_and_gradient(student, labels, divergence)[0].loss
        for k in (1, 3, 8, 20, V)
    ]
    assert (of_k[0] >= 0).all()
    for less, more in pairwise(of_k):
        assert (more - less > -1e-12).all()
        assert (more > less).any()
    whole = statistics_and_gradient(student, teacher, labels, divergence)[0].loss
    torch.testing.assert_close(of_k[-1], whole)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_a_tail_of_no_mass_is_finite(divergence):
    """A confident teacher, and a confident student: their tails underflow."""
    sure = torch.full((2, V), -1e5)
    sure[:, 3] = 0.0
    known = TopK.of_logits(sure, 2).stored()
    for student in (sure, torch.zeros(2, V)):
        found, grad = known.statistics_and_gradient(student, torch.full((2,), 3), divergence)
        assert torch.isfinite(torch.stack(found)).all()
        assert torch.isfinite(grad).all()
    same, grad = known.statistics_and_gradient(sure, torch.full((2,), 3), divergence)
    assert max(same.loss.abs().max(), grad.abs().max()) < 1e-7


def test_by_products():
    student, teacher = logits()
    found, none = TopK.of_logits(teacher, 4).statistics_and_gradient(student, torch.zeros(6), jsd(0.5), gradient=False)
    whole, _ = statistics_and_gradient(student, teacher, torch.zeros(6), jsd(0.5))
    assert none is None
    torch.testing.assert_close(found.student_entropy, whole.student_entropy)
    assert found.agreement.tolist() == whole.agreement.tolist()
    assert (found.forward_kl < whole.forward_kl).all()
    assert (found.teacher_entropy < whole.teacher_entropy).all()


def test_what_is_stored():
    """float16 rounds a log-probability by at most 2^-11 of it, and clamps at its lowest number, for e^-65504."""
    _, teacher = logits()
    teacher[0, 5] = -1e6
    exact, kept = TopK.of_logits(teacher, V), TopK.of_logits(teacher, V).stored()
    assert [t.dtype for t in kept.tensors] == [torch.int32, torch.float16, torch.float32]
    assert (kept.tail == -torch.inf).all()
    assert kept.log_probs.min() == -65504
    usual = exact.log_probs > -1000
    torch.testing.assert_close(kept.log_probs[usual].double(), exact.log_probs[usual], rtol=2**-11, atol=2**-25)
    assert (exact.log_probs[:, :-1] >= exact.log_probs[:, 1:]).all()
    light = TopK.of_logits(torch.tensor([[0.0, -300.0, -301.0]]), 1).stored()  # below the smallest float, e^-104
    assert light.tail.item() == pytest.approx(-300 + 0.3133, abs=1e-3)


@pytest.mark.parametrize("kd_ratio", [1.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_chunks_heads_and_their_gradients(kd_ratio, softcap, monkeypatch):
    """Over chunk borders, with a trainable head of a wider vocabulary, its bias, a scale and a softcap."""
    monkeypatch.setattr("gkd.losses.objective.chunk_tokens", lambda *a: 4)
    torch.manual_seed(0)
    n, k = 11, 5
    linear, hidden = nn.Linear(8, V + 3).double(), torch.randn(n, 8, dtype=torch.float64, requires_grad=True)
    head = LogitHead(linear, 1.7, softcap)
    teacher, labels = 3 * torch.randn(n, V, dtype=torch.float64), torch.randint(V, (n,))
    raw = linear(hidden)[:, :V] * 1.7
    values = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    expected = naive(values, teacher, k, labels, jsd(0.5), 1.3, kd_ratio).sum()
    wanted = torch.autograd.grad(expected * 0.7, [hidden, *linear.parameters()])
    known = TopK.of_logits(teacher, k, 1.3)
    params = tuple(linear.parameters())
    loss, statistics = distillation_loss(hidden, known, labels, head, None, V, 0.5, 1.3, kd_ratio, params)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert statistics.shape == (6, n)
    for a, b in zip(torch.autograd.grad(loss * 0.7, [hidden, *params]), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_nothing_scored():
    hidden, head = torch.randn(3, 8, requires_grad=True), nn.Linear(8, V)
    loss, _ = distillation_loss(hidden[:0], TopK.empty(4), torch.zeros(0, dtype=torch.long), head, None, V, 0.5)
    loss.backward()
    assert loss.item() == hidden.grad.abs().sum() == 0


def test_of_hidden_states_in_chunks(monkeypatch):
    monkeypatch.setattr("gkd.losses.topk.chunk_tokens", lambda *a: 32)
    torch.manual_seed(0)
    linear, hidden = nn.Linear(8, V + 3), torch.randn(41, 8)
    target = HiddenTarget(hidden, LogitHead(linear, 1.0, None))
    found = TopK.of_target(target, len(hidden), V, 6, 1.3, hidden.device)
    expected = TopK.of_logits(linear(hidden)[:, :V].detach(), 6, 1.3).stored()
    assert (found.ids == expected.ids).all()
    torch.testing.assert_close(found.log_probs, expected.log_probs)
    torch.testing.assert_close(found.tail, expected.tail)
    assert len(TopK.of_target(target, 0, V, 6, 1.3, hidden.device)) == 0
