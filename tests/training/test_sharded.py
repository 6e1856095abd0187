"""Student and teacher, or the teacher alone, sharded over two ranks: loss and gradients of a float64 reference on one."""

from importlib.util import find_spec

import pytest
from ranks import check, run

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
