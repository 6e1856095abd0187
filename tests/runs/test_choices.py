"""What a run chose is told once and kept, taken again on resume, put aside where it is damaged, and shared by ranks."""

import json
import shutil

import pytest
from preloaded import run_ranks
from tiny import REPO

from gkd.runs.choices import GENERATION_ROWS, MICRO_ROWS, NAME, Choices


def test_a_choice_is_told_once_and_kept(tmp_path, caplog):
    choices = Choices(tmp_path)
    assert choices.get(MICRO_ROWS) is None
    choices.lower(MICRO_ROWS, 3, "Three rows.")
    choices.lower(GENERATION_ROWS, 4, "Four rows.")
    assert [record.message for record in caplog.records] == [
        f"{told} {tmp_path / NAME} keeps it." for told in ("Three rows.", "Four rows.")
    ]
    again = Choices(tmp_path)
    assert [again.get(name) for name in (MICRO_ROWS, GENERATION_ROWS)] == [3, 4]
    Choices().lower(GENERATION_ROWS, 2, "No folder.")
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_checkpoints_choices_replace_later_ones_but_for_those_that_stopped_the_run(tmp_path):
    first, second = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    choices = Choices(tmp_path)
    for checkpoint in (first, second):
        checkpoint.mkdir()
        choices.save(checkpoint, writes=True)
        choices.lower(GENERATION_ROWS, 32, "")
        choices.lower(MICRO_ROWS, 8, "")
    assert not (first / NAME).exists()  # nothing was chosen yet
    choices.lower(GENERATION_ROWS, 16, "")
    choices.lower(MICRO_ROWS, 4, "", stops=True)

    def after(checkpoint, folder=tmp_path):
        resumed = Choices(folder)
        resumed.resume(checkpoint)
        assert json.loads((folder / NAME).read_text())["chosen"].get(MICRO_ROWS) == resumed.get(MICRO_ROWS)
        return resumed.get(GENERATION_ROWS), resumed.get(MICRO_ROWS)

    assert Choices(tmp_path).get(GENERATION_ROWS) == 16
    for _ in range(2):  # a start that is killed before its first checkpoint changes nothing
        assert after(second) == (32, 4)
        assert after(first) == (None, 4)
    assert after(second, tmp_path / "elsewhere") == (32, 8)


DAMAGED = ["", '{"chosen": {', "[]", "[" * 100_000, '{"chosen": {}}', '{"chosen": 3, "at_most": {}}', b"\xff"]
DAMAGED += [
    f'{{"chosen": {{"micro_rows": {value}}}, "at_most": {{}}}}' for value in ('"2"', "-1", "2.0", "true", "null")
]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_choices_are_put_aside(tmp_path, caplog, content):
    path = tmp_path / NAME
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    choices = Choices(tmp_path)
    assert choices.get(MICRO_ROWS) is None
    assert f"{path} is damaged (" in caplog.text
    assert "is now choices.json.damaged. What it held is chosen again." in caplog.text
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    shutil.move(f"{path}.damaged", checkpoint / NAME)
    with pytest.raises(ValueError, match=r"checkpoint-1/choices.json is damaged: .*Resume from another checkpoint"):
        choices.resume(checkpoint)
    choices.lower(MICRO_ROWS, 2, "")
    assert Choices(tmp_path).get(MICRO_ROWS) == 2


def test_ranks_agree(tmp_path):
    """Memory is short on one rank: it generates fewer rows at once, and the other one from the next checkpoint on."""
    done = run_ranks([REPO / "tests/workers/choices_worker.py", tmp_path], 2)
    assert done.returncode == 0, done.stderr[-3000:]
    zero, one = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1))
    assert [zero["rows"], one["rows"]] == [[4, 4, 1, 1, 1, 1, 1, 1, 1, 1], [4, 2, *[1] * 16]]
    for found in (zero, one):
        assert found["resumed"] == [1] * 8
        assert found["losses"] == pytest.approx(found["expected"], rel=1e-5)
        assert found["again"] == found["losses"][2:]
        assert "is damaged" in found["refused"]
    for folder in ("short", "short/checkpoint-2", "short/checkpoint-4"):
        assert json.loads((tmp_path / folder / NAME).read_text())["chosen"] == {GENERATION_ROWS: 1}
    assert done.stderr.count("prompts generating at a time") == 2
