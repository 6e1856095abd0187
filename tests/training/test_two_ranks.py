"""One rank with accumulation 4, two ranks with accumulation 2, four and eight with 1, and a float64 reference: one loss, one gradient."""

import json

import pytest
from preloaded import run_ranks
from ranks import WORKER, check, run


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_loss_and_gradient_do_not_depend_on_the_number_of_ranks(tmp_path, ranks):
    runs = run(tmp_path, ranks, "ddp", ["full:0", "full:1", "double:1"])
    for lmbda in (0, 1):
        check(runs[f"full:{lmbda}"], "full", lmbda, ranks=ranks)
    check(runs["double:1"], "double", 1, tolerance=1e-10, ranks=ranks)
    if ranks == 2:  # rows moved: as they come, one rank has 36 tokens
        assert max(runs["double:1"]["tokens"]) < 35


def test_ranks_that_lack_different_text_stay_in_step(tmp_path):
    """Shuffled anew each epoch, a rank finds text of more of its prompts than the other: neither waits for ever."""
    done = run_ranks([WORKER.with_name("epochs_worker.py"), tmp_path], 2)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = [log for log in json.loads((tmp_path / "log.json").read_text()) if "loss" in log]
    assert [log["step"] for log in logs] == list(range(1, 13))  # 16 rows, 4 a step, 3 epochs
    by_teacher = [
        [entry for entry in json.loads((tmp_path / f"generated-{rank}.json").read_text()) if entry[1] == "teacher"]
        for rank in (0, 1)
    ]
    assert by_teacher[0] != by_teacher[1], "this test needs ranks that lack different text"
    assert sum(n for entries in by_teacher for *_, n in entries) <= 16  # each prompt at most once
