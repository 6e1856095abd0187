"""Student and teacher, or the teacher alone, sharded over two ranks: loss and gradients of a float64 reference on one."""

from importlib.util import find_spec

import pytest
from ranks import check, run

from gkd.models.sharding import ranks_that_share

CASES = {
    "fsdp2": [f"{kind}:{lmbda}" for kind in ("full", "tied", "lora", "lora_head") for lmbda in (0, 1)],
    "ddp+sharded": ["full:teacher", "tied:0", "lora_self:1"],
    "zero2": ["full:0", "lora:1", "lora_self:0"],
    "zero2+sharded": ["full:0", "lora:1", "full:teacher"],
    "zero3": [f"{kind}:{lmbda}" for kind in ("full", "tied", "lora") for lmbda in (0, 1)],
}


@pytest.fixture(scope="module")
def runs():
    return {}


@pytest.mark.parametrize(("wrapper", "case"), [(wrapper, case) for wrapper in CASES for case in CASES[wrapper]])
def test_sharded_models_have_the_loss_and_gradients_of_one_rank(runs, tmp_path, wrapper, case):
    if wrapper.startswith("zero") and not find_spec("deepspeed"):
        pytest.skip("needs deepspeed")
    if wrapper not in runs:
        runs[wrapper] = run(tmp_path, 2, wrapper, CASES[wrapper])
    kind, writer = case.split(":")
    if (
        wrapper != "zero2" and kind != "lora_self"
    ):  # the teacher is sharded: fewer forwards than micro-batches, as many on each rank
        found = runs[wrapper][case]
        assert found["forwards"] == [1, 1]
        assert found["batches"] == [2, 2]
        assert found["error"] < 1e-5
    check(runs[wrapper][case], kind, writer if writer == "teacher" else int(writer))


def test_two_machines_have_a_teacher_each(tmp_path):
    """Its layers are gathered from the two ranks of a machine, not from all four."""
    found = run(tmp_path, 4, "ddp+machines", ["full:1", "full:teacher"])
    for case, writer in (("full:1", 1), ("full:teacher", "teacher")):
        assert found[case]["shards"] == 2
        assert found[case]["error"] < 1e-5
        check(found[case], "full", writer)


def test_a_teacher_that_is_too_large_for_a_machine_is_sharded_over_all():
    assert ranks_that_share(160, 16, 8, 80) == 8  # 20 of 80 on each GPU
    assert ranks_that_share(161, 16, 8, 80) == 16
    assert ranks_that_share(1, 8, 8, 80) == 8  # one machine
    assert ranks_that_share(1, 4, 1, 80) == 4  # one GPU each
    assert ranks_that_share(1, 12, 0, 80) == 12  # of 8 and 4 GPUs
