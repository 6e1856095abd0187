"""The divergence, forward and backward to the hidden states: stock TRL's formula, TRL's kernel, Liger's and gkd's.

    python benchmarks/divergence.py
    python benchmarks/divergence.py --dense        # also the whole logits of 8192 tokens, which take 59 GiB

On a GPU: bf16, vocabulary 128256, the hidden sizes of Llama 1B and 8B; on the CPU small shapes in fp32. All variants of a
case run in one process on one device and take turns, so that their ratios are comparable. The columns: the median of
nine calls after three warm-ups, peak memory above the inputs (gradients included), and the relative L2 errors of the
summed loss and of its gradients to the hidden states (and to the head, if it trains), against float64 on the same inputs.
Most of the loss's error comes from the GPU's matrix products, which all variants share. So it is also measured on
inputs with so few bits that products are exact in fp32, in any order of summation.

The floor is the time of three matrix products (both models' logits, the gradient to the hidden states; a fourth for a
head that trains) at the rate of a large one, which each case measures: `matmul`.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from common import CUDA, DEVICE, DTYPE, Column, emit, matmul_rate, parser, run_all, synchronize, timed, write
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from gkd.compat import StockGKDTrainer
from gkd.io.errors import first_line
from gkd.losses.objective import distillation_loss
from gkd.models.heads import LogitHead

try:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
except ImportError:
    LigerFusedLinearJSDLoss = None

WARM_UPS, ROUNDS = 3, 9
COLUMNS = [
    Column("run", "run"),
    Column("ms", "ms", ".1f"),
    Column("to_gkd", "ms / gkd", ".2f"),
    Column("floor", "floor ms", ".1f"),
    Column("above_floor", "ms / floor", ".2f"),
    Column("peak_gib", "peak GiB", ".2f"),
    Column("peak_to_gkd", "peak / gkd", ".2f"),
    Column("loss_error", "loss error", ".1e"),
    Column("exact_products_error", "loss error, products exact", ".1e"),
    Column("gradient_error", "gradient error", ".1e"),
    Column("head_error", "head gradient error", ".1e"),
    Column("rate", "matmul TFLOP/s", ".3g"),
]


@dataclass
class Case:
    tokens: int
    hidden: int
    teacher_hidden: int
    vocab: int
    beta: float
    trains: bool = False

    @property
    def name(self) -> str:
        head = ", head trains" if self.trains else ""
        return f"N {self.tokens}, hidden {self.hidden}/{self.teacher_hidden}, β {self.beta:g}{head}"

    def flops(self) -> float:
        student_products = 3 if self.trains else 2
        return 2 * self.tokens * self.vocab * (student_products * self.hidden + self.teacher_hidden)


if CUDA:
    CASES = [Case(768, 2048, 4096, 128256, 0.5)]
    CASES += [Case(4096, 2048, 4096, 128256, beta) for beta in (0.5, 0.0, 1.0)]
    CASES += [Case(8192, 2048, 4096, 128256, 0.5), Case(8192, 4096, 4096, 128256, 0.5, trains=True)]
else:
    CASES = [Case(96, 64, 96, 4096, beta) for beta in (0.5, 0.0, 1.0)] + [Case(96, 64, 64, 4096, 0.5, trains=True)]


class Inputs:
    """Hidden states and heads of a case, and the summed divergence by each variant."""

    def __init__(self, case: Case, exact_products: bool = False):
        torch.manual_seed(0)
        draw = {"device": DEVICE, "dtype": DTYPE}
        self.case = case
        self.hidden = torch.randn(case.tokens, case.hidden, **draw).requires_grad_()
        self.teacher_hidden = torch.randn(case.tokens, case.teacher_hidden, **draw)
        self.labels = torch.randint(case.vocab, (case.tokens,), device=DEVICE)
        self.head, self.teacher_head = (
            torch.nn.Linear(size, case.vocab, bias=False, **draw).requires_grad_(False)
            for size in (case.hidden, case.teacher_hidden)
        )
        for head in (self.head, self.teacher_head):
            head.weight.copy_(0.05 * torch.randn_like(head.weight))
        if exact_products:  # integers of 5 and 6 bits over a power of two
            with torch.no_grad():
                for states in (self.hidden, self.teacher_hidden):
                    states.mul_(4).round_().clamp_(-15, 15).div_(4)
                for head in (self.head, self.teacher_head):
                    head.weight.div_(0.05 / 4).round_().clamp_(-15, 15).mul_(3 / 256)
        self.head.weight.requires_grad_(case.trains)

    def dense(self) -> torch.Tensor:
        logits = self.head(self.hidden).float(), self.teacher_head(self.teacher_hidden).float()
        return StockGKDTrainer.generalized_jsd_loss(*logits, beta=self.case.beta, reduction="sum")

    def trl(self) -> torch.Tensor:
        student, teacher = (self.hidden, self.head.weight, None), (self.teacher_hidden, self.teacher_head.weight, None)
        return ChunkedDivergenceFunction.apply(*student, *teacher, self.case.beta)[0].sum()

    def liger(self) -> torch.Tensor:
        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=self.case.beta)
        student, teacher = (self.hidden, self.head.weight), (self.teacher_hidden, self.teacher_head.weight)
        return loss(*student, *teacher, self.labels) * self.case.tokens  # Liger returns the mean

    def gkd(self) -> torch.Tensor:
        heads = LogitHead(self.head, 1.0, None), LogitHead(self.teacher_head, 1.0, None)
        params = (self.head.weight,) if self.case.trains else ()
        states = self.hidden, self.teacher_hidden
        return distillation_loss(*states, self.labels, *heads, self.case.vocab, self.case.beta, head_params=params)[0]

    def step(self, variant: Callable[["Inputs"], torch.Tensor]) -> torch.Tensor:
        self.hidden.grad = self.head.weight.grad = None
        loss = variant(self)
        loss.backward()
        return loss.detach()

    def in_float64(self) -> tuple[float, torch.Tensor, torch.Tensor | None]:
        """The summed loss, its gradient to the hidden states, and to the head if it trains."""
        beta, rows = self.case.beta, 256
        weight = self.head.weight.detach().double().requires_grad_(self.case.trains)
        teacher_weight = self.teacher_head.weight.double()
        total, grads = 0.0, []
        for start in range(0, self.case.tokens, rows):
            hidden = self.hidden[start : start + rows].detach().double().requires_grad_()
            s = F.log_softmax(hidden @ weight.T, -1)
            t = F.log_softmax(self.teacher_hidden[start : start + rows].double() @ teacher_weight.T, -1)
            if beta in (0.0, 1.0):
                p, q = (t, s) if beta == 0.0 else (s, t)
                loss = (p.exp() * (p - q)).sum()
            else:
                m = torch.logaddexp(s + math.log(1 - beta), t + math.log(beta))
                loss = beta * (t.exp() * (t - m)).sum() + (1 - beta) * (s.exp() * (s - m)).sum()
            loss.backward()
            total += loss.item()
            grads.append(hidden.grad)
        return total, torch.cat(grads), weight.grad


def relative_error(computed: torch.Tensor, expected: torch.Tensor) -> float:
    return ((computed.double() - expected).norm() / expected.norm()).item()


def measure(case: Case, dense: bool) -> None:
    rate = matmul_rate()
    exact_inputs = Inputs(replace(case, tokens=min(case.tokens, 1024)), exact_products=True)
    exactly, *_ = exact_inputs.in_float64()
    inputs = Inputs(case)
    expected, expected_grad, expected_head = inputs.in_float64()
    variants = {"dense fp32": Inputs.dense, "TRL chunked": Inputs.trl, "Liger": Inputs.liger, "gkd": Inputs.gkd}
    rows: dict[str, dict] = {name: {"run": f"{case.name}: {name}", "variant": name, **vars(case)} for name in variants}
    if LigerFusedLinearJSDLoss is None:
        rows["Liger"]["failed"] = "not installed"
    if CUDA and case.tokens > 4096 and not dense:
        rows["dense fp32"]["failed"] = "left out (59 GiB): --dense"
    for name, variant in variants.items():
        row = rows[name]
        if "failed" in row:
            continue
        try:
            for _ in range(WARM_UPS):
                loss = inputs.step(variant)
            row["loss_error"] = abs(loss.item() - expected) / expected
            row["exact_products_error"] = abs(exact_inputs.step(variant).item() - exactly) / exactly
            row["gradient_error"] = relative_error(inputs.hidden.grad, expected_grad)
            if case.trains:
                row["head_error"] = relative_error(inputs.head.weight.grad, expected_head)
            inputs.hidden.grad = inputs.head.weight.grad = None
            if CUDA:
                synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                inputs.step(variant)
                row["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        except Exception as error:  # mostly out of memory; the other variants still run
            row["failed"] = f"{type(error).__name__}: {first_line(error)[:200]}"
        inputs.hidden.grad = inputs.head.weight.grad = None
        if CUDA:
            torch.cuda.empty_cache()
    del exact_inputs, expected_grad, expected_head
    alive = [name for name in variants if "failed" not in rows[name]]
    seconds = {name: [] for name in alive}
    for _ in range(ROUNDS):
        for name in alive:
            seconds[name].append(timed(lambda variant=variants[name]: inputs.step(variant)))
    for name in alive:
        rows[name] |= {"ms": 1000 * statistics.median(seconds[name]), "seconds": seconds[name]}
    ours = rows["gkd"]
    for name, row in rows.items():
        if name in alive:
            row |= {"floor": 1000 * case.flops() / rate, "rate": rate / 1e12}
            row["above_floor"] = row["ms"] / row["floor"]
            if "ms" in ours:
                row["to_gkd"] = row["ms"] / ours["ms"]
            if "peak_gib" in ours:
                row["peak_to_gkd"] = row["peak_gib"] / ours["peak_gib"]
        emit(**row)


def main() -> None:
    arguments = parser(__doc__, "divergence", limit=300)
    arguments.add_argument("--only", nargs="+", default=[""], help="cases whose name holds one of these texts")
    arguments.add_argument("--dense", action="store_true", help="whole logits of 8192 tokens too")
    args = arguments.parse_args()
    cases = {case.name: case for case in CASES if any(text in case.name for text in args.only)}
    if args.variant:
        measure(cases[args.variant], args.dense)
        return
    rows = run_all(list(cases), args, COLUMNS)
    write(args, COLUMNS, rows)


if __name__ == "__main__":
    main()
