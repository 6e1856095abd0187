"""Loading and checking rows: which are accepted, and the messages for the others."""

import json

import pytest

from gkd.data import loading
from gkd.data.loading import check_rows, load_rows
from gkd.data.rows import DataError

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
EMPTY = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]}


def write(path, rows):
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".csv"])
def test_files(tmp_path, suffix):
    from datasets import Dataset

    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        Dataset.from_list([GOOD, GOOD]).to_parquet(path)
    elif suffix == ".csv":
        path.write_text("prompt,completion\n1+1=,2\n2+2=,4\n")
    else:
        write(path, [GOOD, GOOD])
    rows = load_rows(str(path), "train")
    check_rows(rows, str(path), needs_answers=True)
    assert len(rows) == 2


def test_folder_with_splits(tmp_path):
    write(tmp_path / "train.json", [GOOD] * 3)
    write(tmp_path / "test.json", [GOOD])
    assert len(load_rows(str(tmp_path), "train")) == 3
    assert len(load_rows(str(tmp_path), "test")) == 1
    with pytest.raises(DataError, match="can't load split 'validation'"):
        load_rows(str(tmp_path), "validation")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.json", '[{"prompt": "a"},\n {"prompt": }]', r"broken.json, line 2, column 13: broken JSON"),
        ("broken.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"broken.jsonl, line 2: broken JSON"),
        ("empty.json", "[]", "holds no rows"),
        ("mixed.json", json.dumps([GOOD, {"messages": "hello"}]), "row 1: `messages` must be a non-empty list"),
        ("rows.txt", "hello", "unknown file type '.txt'"),
        ("short.csv", "prompt,completion\na,b\nc\n", "short.csv, line 3: 1 fields, but the header names 2"),
        ("shifted.tsv", "prompt\tcompletion\na\tb\tc\n", "shifted.tsv, line 2: 3 fields, but the header names 2"),
        ("quote.csv", 'prompt,completion\n"Hello" he said,b\n', "quote.csv, line 2: broken CSV"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        check_rows(load_rows(str(tmp_path / name), "train"), name, needs_answers=False)


NULL = "row {}: not an object but NoneType"
HALF = "row {}: its text is not Unicode: half of a surrogate pair, after '.*a'"
DEEP = "nested too deeply: 100,00[0-9] levels of brackets"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("first.json", '[null, {"prompt": "a"}]', NULL.format(0)),
        ("last.json", '[{"prompt": "a"},\n null\n]', NULL.format(1)),
        ("bom.jsonl", '\ufeffnull\n{"prompt": "a"}\n', NULL.format(0)),
        ("line.jsonl", '{"prompt": "a"}\r\n  null\r\n', NULL.format(1)),
        ("half.json", r'[{"prompt": "\ud83d\ude00"}, {"prompt": "a\ud800b"}]', HALF.format(1)),
        ("half.jsonl", r'{"prompt": "\\ud800"}' + "\n" + r'{"prompt": "a\udc00b"}', HALF.format(1)),
        ("open.json", "[" * 100_000, DEEP),
        ("deep.json", '[{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}]", f"row 0: {DEEP}"),
        ("deep.jsonl", '{"prompt": "a"}\n' + '{"a": ' * 100_000 + "1" + "}" * 100_000, f"row 1: {DEEP}"),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_json_that_the_loader_dies_of_or_changes(tmp_path, name, content, message, folder):
    """Each once crashed the process or raised a RecursionError, or was read as other text."""
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / name
    path.write_text(content, encoding="utf-8", newline="")
    with pytest.raises(DataError, match=f"{name}(, |: ){message}"):
        load_rows(str(path.parent if folder else path), "train")


def test_json_that_only_looks_suspicious(tmp_path):
    row = {"prompt": "[null, 1], " + "[" * 300, "completion": r"\ud800", "chat_template_kwargs": {"a": [None, "null"]}}
    for name in ("rows.json", "rows.jsonl"):
        assert load_rows(write(tmp_path / name, [row, row]), "train")[1]["completion"] == r"\ud800"


def test_missing_file():
    with pytest.raises(DataError, match="nowhere/rows.json: no such file"):
        load_rows("nowhere/rows.json", "train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "hello"}, "row 1: neither `messages` nor `prompt`, but 'text'"),
        ({"instruction": "a", "output": "b"}, "row 1: an alpaca row; .*convert_data.py"),
        ({"messages": [{"content": "hi"}]}, r"row 1: `messages\[0\]` must be an object with a `role`"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "row 1: .*both be text or both"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "row 1: the prompt is empty"),
        (GOOD | {"chat_template_kwargs": "{}"}, "row 1: `chat_template_kwargs` must be an object, not str"),
        (GOOD | {"chat_template_kwargs": [["a", 1]]}, "row 1: `chat_template_kwargs` must be an object, not list"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(DataError, match=message):
        check_rows([GOOD, row], "rows.json", needs_answers=False)


def test_empty_answers_need_somebody_who_writes():
    check_rows([GOOD, EMPTY], "rows.json", needs_answers=False)
    with pytest.raises(
        DataError, match=r"1 of 2 rows have no answer \(the first is row 1\).*--seq_kd True.*--lmbda 1"
    ):
        check_rows([GOOD, EMPTY], "rows.json", needs_answers=True)


DAY = [
    {"prompt": f"day {i}", "completion": f"2021-03-{i + 10}", "metadata": {"on": "2021-01-01T10:00:00Z"}}
    for i in range(9)
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_dates_are_text(tmp_path, monkeypatch, suffix, streaming):
    rows = [*DAY[:8], DAY[8] | {"answer": None}, {"prompt": "bare"}]
    lines = "\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows)
    path = tmp_path / f"rows.{suffix}"
    path.write_text(lines, encoding="utf-8")
    read = list(load_rows(str(path), "train", streaming=streaming))
    assert [{name: value for name, value in row.items() if value is not None} for row in read] == [*DAY, rows[-1]]
    path.write_text(lines.replace("2021-03", "2022-04"), encoding="utf-8")  # not what a cache kept
    assert next(iter(load_rows(str(path), "train", streaming=streaming)))["completion"] == "2022-04-10"
    # Text in the first part of a file, and dates alone in the second.
    monkeypatch.setattr(loading, "_PART", 10)
    path.write_text(lines.replace("2021-03-10", "some day"), encoding="utf-8")
    assert [row["completion"] for row in load_rows(str(path), "train", streaming=streaming)][:2] == [
        "some day",
        "2021-03-11",
    ]


def test_dates_in_a_folder_are_refused_where_text_is_needed(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, DAY)))
    with pytest.raises(DataError, match="the text in column 'completion' looks like dates"):
        load_rows(str(tmp_path), "train")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row | {"completion": "some day"}) for row in DAY))
    assert load_rows(str(tmp_path), "train")[0]["completion"] == "some day"
