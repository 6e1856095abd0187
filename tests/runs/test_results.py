"""Results of evaluations that are damaged on the disk: put aside and made anew."""

import json
from pathlib import Path

import pytest
from trainers import TWELVE_ROWS, make_trainer

from gkd.report.write import write_report
from gkd.runs.results import RECORD_FIELDS, RESULT_FIELDS, add_result, read_records, read_results, write_records


@pytest.mark.parametrize(
    ("name", "damaged", "kept", "said"),
    [
        (
            "results.json",
            lambda whole: b"",
            {"step 2", "step 3", "teacher"},
            "Whole results, which are kept: 0; eval_gkd.py finds the others again.",
        ),
        (
            "results.json",
            lambda whole: whole[: whole.index(b'"step 1"')],
            {"before", "step 2", "step 3", "teacher"},
            "Whole results, which are kept: 2; ",
        ),
        (
            "results.json",
            lambda whole: b'{"results": [{"model": "before"}]}',
            {"step 2", "step 3", "teacher"},
            "entry",
        ),
        ("rows", lambda whole: b"", None, None),
        ("rows", lambda whole: whole[:30] + b"\x00" + whole[31:], None, "line 1) and is now"),
        (
            "rows",
            lambda whole: whole[:-1].replace(b'"row"', b'"rwo"') + b"\n",
            None,
            "line 1 and 1 others) and is now",
        ),
    ],
    ids=["empty", "torn", "no results", "rows empty", "row broken", "no rows"],
)
def test_a_damaged_evaluation_is_put_aside_and_made_anew(tmp_path, caplog, name, damaged, kept, said):
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "held_out": TWELVE_ROWS[:2]}
    make_trainer(tmp_path, max_steps=1, **options).train()
    folder = tmp_path / "run/evaluation"
    before = {result["model"]: result for result in read_results(tmp_path / "run")}
    assert before.keys() == {"before", "step 1", "teacher"}
    path = folder / name if kept else folder / "rows" / before["teacher"]["records"]
    whole = path.read_bytes()
    path.write_bytes(damaged(whole))
    make_trainer(tmp_path, max_steps=3, **options | {"eval_on_start": False}).train(resume_from_checkpoint=True)
    after = {result["model"]: result for result in read_results(tmp_path / "run")}
    assert after.keys() == (kept or {"before", "step 1", "step 2", "step 3", "teacher"})
    assert after["teacher"]["metrics"] == before["teacher"]["metrics"]
    if kept is None:  # the rows that the damaged file lacks are evaluated again, to the same text
        texts = [[json.loads(line)["text"] for line in part.splitlines()] for part in (whole, path.read_bytes())]
        assert texts[0] == texts[1]
    if said is not None:
        (line,) = [record.message for record in caplog.records if "is damaged" in record.message]
        assert line.startswith(f"{path} is damaged (")
        assert said in line
        assert Path(f"{path}.damaged").read_bytes() == damaged(whole)
    assert not list((tmp_path / "run").rglob("*.partial"))


RESULT = dict.fromkeys(RESULT_FIELDS, 1) | {
    "model": "after",
    "step": None,
    "data": "d",
    "settings": "s",
    "metrics": {},
}


@pytest.mark.parametrize(
    "change",
    [
        {"model": ["after"]},
        {"step": "1"},
        {"data": None},
        {"gib": "1"},
        {"metrics": {"score/x": 0.5}},
        {"metrics": {"score/x": {"value": 1, "low": None, "high": 1}}},
        {"metrics": {"elsewhere/x": {"value": 1, "low": 1, "high": 1}}},
        {"metrics": {"score": {"value": 1, "low": 1, "high": 1}}},
        {"change": {"score/x": {"value": "1", "low": 1, "high": 1}}},
        {"by_teacher": [1]},
        {"by_teacher": {"math": {"rows": "2", "metrics": {}, "change": {}}}},
        {"by_teacher": {"math": {"rows": 2, "metrics": {"score/x": 1}, "change": {}}}},
    ],
    ids=str,
)
def test_what_is_no_result_is_put_aside(tmp_path, caplog, change):
    figures = {"score/x": {"value": 1, "low": float("nan"), "high": 1.5}}
    part = {"rows": 2, "metrics": figures, "change": figures}
    whole = RESULT | {"metrics": figures, "change": figures, "by_teacher": {"math": part}}
    path = tmp_path / "evaluation/results.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"results": [whole, whole | change]}))
    (entry,) = read_results(tmp_path)
    assert "results.json is damaged (an entry is not a result) and is now results.json.damaged" in caplog.text
    assert entry["model"] == "after"
    assert entry["step"] is None
    assert len(read_results(tmp_path)) == 1


def test_half_of_a_surrogate_pair_ends_no_evaluation(tmp_path):
    """It comes in names of files, for one: Python reads a byte of them that does not decode as such a half."""
    half = "a\ud800b \udce9"
    records = [dict.fromkeys(RECORD_FIELDS) | {"row": 0, "text": half}]
    write_records(tmp_path / "rows.jsonl", records)
    assert read_records(tmp_path / "rows.jsonl") == records
    add_result(tmp_path, RESULT | {"model": half, "data": half})
    assert read_results(tmp_path)[0]["data"] == half
    write_report(tmp_path, tmp_path / "report")
    assert r"\udce9" in (tmp_path / "report/report.md").read_text(encoding="utf-8")
