"""Steps on several ranks, beside a float64 reference in this process."""

import sys

import pytest
import torch
from preloaded import run_ranks
from progress import run as run_command
from tiny import REPO, make_tokenizer
from workers.ranks_worker import make_student, make_teacher, rows_of

from gkd.data.encoding import RowEncoder
from gkd.losses.divergences import jsd

WORKER = REPO / "tests/workers/ranks_worker.py"


def run(folder, ranks, wrapper, cases):
    """{case: loss and gradients}, of KIND:WRITER each."""
    out = folder / f"{ranks}.pt"
    words = [WORKER, out, wrapper, len(rows_of(ranks)) // ranks, *cases]
    if wrapper.startswith("zero"):  # DeepSpeed is told of the CPU before it is imported
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = run_command([sys.executable, "-m", *torchrun, *map(str, words)])
    else:
        done = run_ranks(words, ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


def reference(writer, kind="full", ranks=1):
    """Loss and gradients in float64: plain forwards of single rows, summed and divided once."""
    tokenizer = make_tokenizer()
    student, teacher = make_student(kind).double().eval(), make_teacher(kind).double().eval()
    encode = RowEncoder(tokenizer, 80, 9, "last_turn", [1, 2])
    total, tokens = 0.0, 0
    for question, answer in rows_of(ranks):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        encoded = encode({"messages": messages})
        prompt, ids = torch.tensor([encoded["prompt_ids"]]), torch.tensor([encoded["input_ids"]])
        if writer != 0:
            ids = (student if writer == 1 else teacher).generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, do_sample=False, eos_token_id=[1, 2], pad_token_id=0)  # fmt: skip
        scored = slice(prompt.shape[1] - 1, ids.shape[1] - 1)
        zs, zt = (model(ids).logits[0, scored] for model in (student, teacher))
        total = total + jsd(0.5).value(zs.log_softmax(-1), zt.detach().log_softmax(-1)).sum()
        tokens += len(zs)
    loss = total / tokens
    loss.backward()
    return loss.item(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def check(found, kind, writer, tolerance=1e-5, ranks=1):
    """The loss, the gradient of each weight, and an evaluation before it are the reference's, to a relative 1e-5.

    `tolerance`: of the gradient. `ranks`: of more than four the step has more rows.
    """
    loss, grads = reference(writer, kind, ranks)
    for source, by in (("dataset", 0), ("on_policy", 1)):
        assert found["evaluated"][f"eval_{source}/loss"] == pytest.approx(reference(by, kind, ranks)[0], rel=1e-5)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["grads"].keys() == grads.keys()
    for name, grad in grads.items():
        error = (found["grads"][name].double() - grad).norm() / grad.norm()
        assert error < tolerance, (name, error)
