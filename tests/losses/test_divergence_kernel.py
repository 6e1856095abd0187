"""The Triton kernel, in Triton's interpreter on the CPU, against the closed form in torch of gkd.losses.divergences."""

import pytest
import torch

from gkd.losses.divergences import jsd, statistics_and_gradient

divergence_kernel = pytest.importorskip("gkd.losses.kernel")
pytestmark = pytest.mark.skipif(
    divergence_kernel.triton is None or torch.cuda.is_available(), reason="needs Triton's interpreter; see test_gpu.py"
)


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch):
    """The interpreter runs programs one after the other, and none may wait for another: so a team is one program."""
    monkeypatch.setattr(divergence_kernel, "SLICE", 128)


def compare(beta, temperature=1.0, kd_ratio=1.0, vocab=100, dtype=torch.float32, heads=None, seed=0, change=None):
    torch.manual_seed(seed)
    student, teacher = (torch.randn(5, vocab) * 4).to(dtype), (torch.randn(5, vocab) * 4).to(dtype)
    if change is not None:
        change(student, teacher)
    labels = torch.randint(vocab, (5,))
    statistics, grad = torch.full((6, 9), torch.nan), torch.full((5, vocab), torch.nan)
    options = {"beta": beta, "temperature": temperature, "kd_ratio": kd_ratio}
    divergence_kernel.launch(student, teacher, labels, grad, statistics[:, 2:7], **options, **(heads or {}))

    heads = {"student_scale": 1.0, "teacher_scale": 1.0, **(heads or {})}
    raw = student.double().requires_grad_()

    def logits(values, who):
        values = (values + heads.get(f"{who}_bias", 0.0)) * heads[f"{who}_scale"]
        cap = heads.get(f"{who}_softcap")
        return values if cap is None else cap * torch.tanh(values / cap)

    z = logits(raw, "student")
    teacher_logits = logits(teacher.double(), "teacher")
    expected, slope = statistics_and_gradient(z.detach(), teacher_logits, labels, jsd(beta), temperature, kd_ratio)
    (wanted,) = torch.autograd.grad(z, raw, slope)
    torch.testing.assert_close(statistics[:, 2:7].double(), torch.stack(expected), rtol=2e-5, atol=2e-5)
    assert statistics[:, :2].isnan().all()
    assert statistics[:, 7:].isnan().all()
    torch.testing.assert_close(grad.double(), wanted, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("temperature", "kd_ratio"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.3), (0.7, 0.3)])
def test_equals_the_closed_form(beta, temperature, kd_ratio):
    compare(beta, temperature, kd_ratio)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_bias_scale_and_softcap(beta):
    heads = {"student_bias": torch.randn(100), "teacher_bias": torch.randn(100)}
    heads |= {"student_scale": 0.5, "teacher_scale": 2.0, "student_softcap": 3.0, "teacher_softcap": 30.0}
    compare(beta, 1.5, 0.5, heads=heads)


def test_half_precision_logits_and_equal_rows():
    compare(0.5, dtype=torch.bfloat16)
    compare(0.5, change=lambda student, teacher: teacher.copy_(student))


def test_impossible_tokens_make_no_nan():
    """A model may mask ids with -inf, one of the two models or both."""

    def mask(student, teacher):
        student[:, 7] = teacher[:, 7] = teacher[:, 9] = -torch.inf

    statistics, grad = torch.empty(6, 5), torch.empty(5, 100)
    for beta in (0.0, 0.5):
        student, teacher = torch.randn(5, 100), torch.randn(5, 100)
        mask(student, teacher)
        labels = torch.zeros(5, dtype=torch.long)
        divergence_kernel.launch(student, teacher, labels, grad, statistics, beta, 1.0, 1.0)
        assert grad.isfinite().all()
        assert statistics[0].isfinite().all()


def test_in_place_gradient_and_a_stride():
    torch.manual_seed(0)
    wide = torch.randn(4, 128)
    student, teacher, labels = wide[:, :100], torch.randn(4, 100), torch.zeros(4, dtype=torch.long)
    expected, wanted = statistics_and_gradient(student, teacher, labels, jsd(0.5))
    statistics, untouched = torch.empty(6, 4), wide[:, 100:].clone()
    divergence_kernel.launch(student, teacher, labels, student, statistics, 0.5, 1.0, 1.0)
    torch.testing.assert_close(student, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(statistics, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert wide[:, 100:].equal(untouched)
