"""One rank with accumulation 4, two ranks with accumulation 2, four with 1, and a float64 reference: one loss, one gradient."""

import json
import sys

import pytest
import torch
from conftest import REPO
from progress import run as run_command
from ranks_worker import ROWS, make_student, make_teacher
from tiny import make_tokenizer

from gkd.data.encoding import RowEncoder
from gkd.losses.divergences import jsd, token_statistics

WORKER = REPO / "tests/workers/ranks_worker.py"


def run(folder, ranks, wrapper, cases):
    """{case: loss and gradients}, of KIND:WRITER each."""
    out = folder / f"{ranks}.pt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*torchrun, WORKER, out, wrapper, str(4 // ranks), *cases]
    done = run_command(command)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


def reference(writer, kind="full"):
    """Loss and gradients in float64: plain forwards of single rows, summed and divided once."""
    tokenizer = make_tokenizer()
    student, teacher = make_student(kind).double().eval(), make_teacher(kind).double().eval()
    encode = RowEncoder(tokenizer, 80, 9, "last_turn", [1, 2])
    total, tokens = 0.0, 0
    for question, answer in ROWS:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        encoded = encode({"messages": messages})
        prompt, ids = torch.tensor([encoded["prompt_ids"]]), torch.tensor([encoded["input_ids"]])
        if writer != 0:
            ids = (student if writer == 1 else teacher).generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, do_sample=False, eos_token_id=[1, 2], pad_token_id=0)  # fmt: skip
        scored = slice(prompt.shape[1] - 1, ids.shape[1] - 1)
        zs, zt = (model(ids).logits[0, scored] for model in (student, teacher))
        total = total + token_statistics(zs, zt.detach(), ids[0, 1:][scored], jsd(0.5)).loss.sum()
        tokens += len(zs)
    loss = total / tokens
    loss.backward()
    return loss.item(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def check(found, kind, writer):
    """The loss, the gradient of each weight, and an evaluation before it are the reference's, to a relative 1e-5."""
    loss, grads = reference(writer, kind)
    for source, by in (("dataset", 0), ("on_policy", 1)):
        assert found["evaluated"][f"eval_{source}/loss"] == pytest.approx(reference(by, kind)[0], rel=1e-5)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["grads"].keys() == grads.keys()
    for name, grad in grads.items():
        error = (found["grads"][name].double() - grad).norm() / grad.norm()
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_loss_and_gradient_do_not_depend_on_the_number_of_ranks(tmp_path, ranks):
    runs = run(tmp_path, ranks, "ddp", ["full:0", "full:1"])
    for lmbda in (0, 1):
        check(runs[f"full:{lmbda}"], "full", lmbda)


def test_sampling_noise_differs_per_rank_and_repeats(tmp_path):
    from gkd.generation.sampling import sampling_seed

    assert sampling_seed(0, 5, rank=0) != sampling_seed(0, 5, rank=1)
    assert sampling_seed(0, 5, rank=1) == sampling_seed(0, 5, rank=1)


def test_ranks_that_lack_different_text_stay_in_step(tmp_path):
    """Shuffled anew each epoch, a rank finds text of more of its prompts than the other: neither waits for ever."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, WORKER.with_name("epochs_worker.py"), str(tmp_path)]
    done = run_command(command)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = [log for log in json.loads((tmp_path / "log.json").read_text()) if "loss" in log]
    assert [log["step"] for log in logs] == list(range(1, 13))  # 16 rows, 4 a step, 3 epochs
    by_teacher = [
        [entry for entry in json.loads((tmp_path / f"generated-{rank}.json").read_text()) if entry[1] == "teacher"]
        for rank in (0, 1)
    ]
    assert by_teacher[0] != by_teacher[1], "this test needs ranks that lack different text"
    assert sum(n for entries in by_teacher for *_, n in entries) <= 16  # each prompt at most once
