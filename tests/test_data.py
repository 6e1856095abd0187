"""Loading and checking rows: what is accepted, and the message for what is not."""

import json

import pytest

from gkd.data import check_rows, load_rows
from gkd.rows import DataError

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
