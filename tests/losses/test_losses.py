"""The divergence against float64 references and autograd."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gkd.losses import kernel
from gkd.losses.divergences import (
    TokenStatistics,
    jsd,
    statistics_and_gradient,
)
from gkd.losses.objective import Objective, distillation_loss, divergence_of
from gkd.losses.projection import Projected
from gkd.losses.skew import SkewKL, SkewReverseKL
from gkd.losses.targets import HiddenTarget
from gkd.losses.topk import TopK
from gkd.losses.total_variation import TotalVariation
from gkd.metrics.divergences import DIVERGENCES as NAMES
from gkd.models.heads import LogitHead

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
OTHERS = [SkewKL(0.1), SkewKL(0.7), SkewReverseKL(0.1), SkewReverseKL(0.7), TotalVariation()]
DIVERGENCES = [*(jsd(beta) for beta in BETAS), *OTHERS]


def reference(student, teacher, beta, temperature=1.0):
    """The definition, written out in float64 on probabilities."""
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (student, teacher))

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    if beta == 0:
        return kl(q, p)
    if beta == 1:
        return kl(p, q)
    m = beta * q + (1 - beta) * p
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def autograd_loss(student, teacher, labels, divergence, temperature=1.0, kd_ratio=1.0):
    """The loss of each token, differentiable."""
    value = divergence.value(*((x / temperature).log_softmax(-1) for x in (student, teacher)))
    return kd_ratio * value + (1 - kd_ratio) * nn.functional.cross_entropy(student, labels, reduction="none")


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("vocab", [7, 1001])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_equals_float64_reference(beta, vocab, temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, vocab) * 3, torch.randn(5, vocab) * 3
    found = statistics_and_gradient(student, teacher, None, jsd(beta), temperature)[0].loss
    torch.testing.assert_close(found.double(), reference(student, teacher, beta, temperature), rtol=2e-5, atol=1e-6)


def definition(divergence, student, teacher):
    """The definitions on probabilities (N, V): the skew KLs of arXiv 2402.03898, and half of the L1 distance."""
    if isinstance(divergence, TotalVariation):
        return (student - teacher).abs().sum(-1) / 2
    p, q = (student, teacher) if isinstance(divergence, SkewReverseKL) else (teacher, student)
    return (p * (p / (divergence.alpha * p + (1 - divergence.alpha) * q)).log()).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", OTHERS, ids=repr)
def test_value_and_gradient_equal_the_definition(divergence, temperature):
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(5, 37, dtype=torch.float64) for _ in range(2))
    labels = torch.zeros(5, dtype=torch.long)

    def defined(logits):
        return definition(divergence, *((x / temperature).softmax(-1) for x in (logits, teacher)))

    found, grad = statistics_and_gradient(student, teacher, labels, divergence, temperature)
    expected = defined(student.requires_grad_())
    torch.testing.assert_close(found.loss, expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), student)[0], rtol=1e-8, atol=1e-12)
    assert torch.autograd.gradcheck(defined, student)  # the definition's own gradient, by differences
    narrow, slope = statistics_and_gradient(student.detach().float(), teacher.float(), labels, divergence, temperature)
    torch.testing.assert_close(narrow.loss.double(), found.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope.double(), grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", OTHERS, ids=repr)
def test_bounds_and_limits(divergence):
    """The divergence never exceeds the bound, however different the models are, and is 0 for equal models."""
    apart = 200 * torch.eye(4, dtype=torch.float64)[:2]  # sure of different tokens
    labels = torch.zeros(1, dtype=torch.long)
    bound = 1.0 if isinstance(divergence, TotalVariation) else -math.log(divergence.alpha)
    found, grad = statistics_and_gradient(apart[:1], apart[1:], labels, divergence)
    assert found.loss.item() == pytest.approx(bound)
    assert grad.isfinite().all()
    same, grad = statistics_and_gradient(apart[:1], apart[:1], labels, divergence)
    assert max(same.loss.abs().max(), grad.abs().max()) < 1e-12


@pytest.mark.parametrize(("kind", "beta"), [(SkewKL, 0.0), (SkewReverseKL, 1.0)])
def test_a_small_skew_is_near_the_kl(kind, beta):
    torch.manual_seed(0)
    student, teacher = (torch.randn(5, 37, dtype=torch.float64) for _ in range(2))
    found = statistics_and_gradient(student, teacher, None, kind(1e-7))
    expected = statistics_and_gradient(student, teacher, None, jsd(beta))
    torch.testing.assert_close(found[0].loss, expected[0].loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)


def test_every_flag_has_its_divergence():
    for name in NAMES:
        found = divergence_of(SimpleNamespace(divergence=name, beta=0.3, skew_alpha=0.2))
        assert found.name == name
        assert list(found.settings) == ([] if NAMES[name].flag is None else [NAMES[name].flag])
        assert list(found.settings.values()) in ([], [0.3], [0.2])


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_evaluation_measures_what_training_minimizes(divergence, monkeypatch):
    monkeypatch.setattr("gkd.losses.objective.chunk_tokens", lambda *a: 64)
    torch.manual_seed(0)
    head, teacher_head = (LogitHead(nn.Linear(width, 29), 1.0, None) for width in (8, 6))
    hidden, labels = torch.randn(41, 8), torch.randint(29, (41,))
    target = HiddenTarget(torch.randn(41, 6), teacher_head)
    objective = Objective(divergence, 29)
    with torch.no_grad():
        _, trained = objective.loss(hidden, target, labels, head)
    measured = objective.measure(hidden, target, labels, head)
    torch.testing.assert_close(measured[: len(trained)], trained, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="whole distribution"):
        objective.measure(hidden, TopK.empty(4), labels, head)


@pytest.mark.parametrize("divergence", OTHERS, ids=repr)
def test_logits_are_alive_a_chunk_at_a_time(divergence, monkeypatch):
    """A divergence without closed form gets a quarter of the chunk, since autograd's graph needs memory too."""
    seen = []
    project = Projected.project
    monkeypatch.setattr("gkd.losses.objective.chunk_tokens", lambda *a: 64)
    head, hidden = nn.Linear(8, 5), torch.randn(41, 8, requires_grad=True)
    monkeypatch.setattr(
        Projected,
        "project",
        lambda self, hidden, gradient: (seen.append(len(hidden)), project(self, hidden, gradient))[1],
    )
    distillation_loss(hidden, hidden, torch.zeros(41, dtype=torch.long), head, head, 5, divergence=divergence)
    assert seen == [16] * 4 + [9] * 2


@pytest.mark.parametrize("beta", BETAS)
def test_bf16_inputs_do_not_mean_bf16_softmax(beta):
    torch.manual_seed(0)
    student = torch.randn(4, 32000).bfloat16()
    teacher = (student.float() + 0.1 * torch.randn(4, 32000)).bfloat16()  # close: where bf16 arithmetic drowns
    found = statistics_and_gradient(student, teacher, None, jsd(beta))[0].loss
    assert found.dtype == torch.float32
    assert (found > 0).all()
    torch.testing.assert_close(found.double(), reference(student, teacher, beta), rtol=1e-3, atol=1e-7)


def test_by_products():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 11), torch.randn(6, 11)
    teacher[:2] = student[:2]
    found, _ = statistics_and_gradient(student, teacher, None, jsd(0.5))
    p, q = torch.softmax(student, -1), torch.softmax(teacher, -1)
    torch.testing.assert_close(found.forward_kl, reference(student, teacher, 0.0).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.reverse_kl, reference(student, teacher, 1.0).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.student_entropy, -(p * p.log()).sum(-1))
    torch.testing.assert_close(found.teacher_entropy, -(q * q.log()).sum(-1))
    assert found.agreement.tolist() == (p.argmax(-1) == q.argmax(-1)).float().tolist()
    assert found.agreement[:2].tolist() == [1.0, 1.0]


def test_kd_ratio_is_torchtunes_mix():
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(6, 11), torch.randn(6, 11), torch.randint(11, (6,))
    found = statistics_and_gradient(student, teacher, labels, jsd(0.0), kd_ratio=0.1)[0].loss
    cross_entropy = nn.functional.cross_entropy(student.double(), labels, reduction="none")
    torch.testing.assert_close(
        found.double(), 0.9 * cross_entropy + 0.1 * reference(student, teacher, 0.0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("beta", BETAS)
def test_closed_forms_to_the_last_bit(beta):
    """The closed forms keep the order of operations: another order changes the bits of a run."""
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 101) * 3, torch.randn(6, 101) * 3
    found, grad = statistics_and_gradient(student, teacher, None, jsd(beta), 1.3)
    log_s, log_t = (torch.log_softmax(logits / 1.3, -1) for logits in (student, teacher))
    s, t, gap = log_s.exp(), log_t.exp(), log_t - log_s
    if beta == 0.0:
        loss, slope = (t * gap).sum(-1), s - t
    elif beta == 1.0:
        loss = -(s * gap).sum(-1)
        slope = s * -(gap + loss[:, None])
    else:
        mixture = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
        kl = (s * (log_s - mixture)).sum(-1)
        loss = beta * (t * (log_t - mixture)).sum(-1) + (1 - beta) * kl
        slope = (log_s - mixture - kl[:, None]) * s * (1 - beta)
    assert found.loss.equal(loss)
    assert grad.equal(slope / 1.3)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("kd_ratio", [1.0, 0.3])
def test_chunked_loss_and_gradients_equal_autograd(divergence, kd_ratio, monkeypatch):
    """Hidden states, head weight and bias, over chunk borders and vocabularies of different padding."""
    monkeypatch.setattr("gkd.losses.objective.chunk_tokens", lambda *a: 4)
    torch.manual_seed(0)
    n, vocab = 11, 29
    head, teacher_head = nn.Linear(8, vocab + 3).double(), nn.Linear(6, vocab + 5).double()
    hidden, teacher_hidden = torch.randn(n, 8, dtype=torch.float64, requires_grad=True), torch.randn(n, 6).double()
    labels = torch.randint(vocab, (n,))
    options = {"divergence": divergence, "temperature": 1.3, "kd_ratio": kd_ratio}

    logits, teacher_logits = head(hidden)[:, :vocab], teacher_head(teacher_hidden)[:, :vocab].detach()
    expected = autograd_loss(logits, teacher_logits, labels, **options).sum()
    wanted = torch.autograd.grad(expected * 0.7, [hidden, *head.parameters()])

    params = tuple(head.parameters())
    loss, sums = distillation_loss(
        hidden, teacher_hidden, labels, head, teacher_head, vocab, **options, head_params=params
    )
    found = torch.autograd.grad(loss * 0.7, [hidden, *params])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums.shape == (len(TokenStatistics._fields), n)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_nothing_scored_gives_zero_loss_and_zero_gradient():
    head = nn.Linear(8, 5)
    hidden = torch.randn(3, 8, requires_grad=True)
    empty = hidden[torch.zeros(3, dtype=torch.bool)]
    labels = torch.zeros(0, dtype=torch.long)
    loss, sums = distillation_loss(
        empty, empty.detach(), labels, head, head, 5, beta=0.5, head_params=tuple(head.parameters())
    )
    loss.backward()
    assert loss.item() == 0.0
    assert sums.sum() == 0
    assert hidden.grad.abs().sum() == 0
    assert head.weight.grad.abs().sum() == 0


def test_second_order_gradients_are_refused():
    hidden = torch.randn(3, 8, requires_grad=True)
    head = nn.Linear(8, 5)
    loss, _ = distillation_loss(hidden, hidden.detach(), torch.zeros(3, dtype=torch.long), head, head, 5, beta=0.5)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        grad.sum().backward()


def test_no_gradient_no_work():
    head = nn.Linear(8, 5)
    with torch.no_grad():
        hidden = torch.randn(3, 8)
        loss, _ = distillation_loss(hidden, hidden, torch.zeros(3, dtype=torch.long), head, head, 5, beta=0.5)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_a_kernel_that_can_not_be_built_gives_way(monkeypatch, caplog):
    """Triton needs a C compiler at run time; without one torch computes the loss, with a single warning."""
    monkeypatch.setattr("gkd.losses.objective.chunk_tokens", lambda *a: 4)
    monkeypatch.setattr(kernel, "_broken", False)
    monkeypatch.setattr(kernel, "supports", lambda *a: not kernel._broken)
    monkeypatch.setattr(kernel, "launch", lambda *a, **k: 1 / 0)
    torch.manual_seed(0)
    head, hidden, labels = nn.Linear(8, 29), torch.randn(11, 8, requires_grad=True), torch.zeros(11, dtype=torch.long)
    teacher_hidden, teacher_head = torch.randn(11, 6), nn.Linear(6, 29)
    for _ in range(2):
        loss, _ = distillation_loss(hidden, teacher_hidden, labels, head, teacher_head, 29, beta=0.5)
    expected = autograd_loss(head(hidden), teacher_head(teacher_hidden), labels, jsd(0.5)).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden), rtol=1e-4, atol=1e-6
    )
    assert caplog.text.count("can't run here") == 1


def test_no_gradient_is_computed_where_none_is_asked_for(monkeypatch):
    """autograd.Function would compute gradients of trainable parameters in an evaluation too."""
    head = torch.nn.Linear(8, 16, bias=False)
    hidden, labels = torch.randn(4, 8), torch.zeros(4, dtype=torch.long)
    monkeypatch.setattr(Projected, "backward", lambda *args: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        distillation_loss(hidden, hidden, labels, head, head, 16, 0.5, head_params=(head.weight,))
