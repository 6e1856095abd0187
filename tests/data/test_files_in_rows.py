"""Files and addresses that rows name are not opened."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value

import convert_data
from gkd.data.loading import check_rows, load_rows
from gkd.data.rows import DataError

_opened: list[str] = []


def _note(event, arguments):
    if event in ("open", "socket.connect", "socket.getaddrinfo"):
        _opened.append(str(arguments))


@pytest.fixture
def opened():
    """Files opened and addresses connected to since the fixture was requested."""
    if not getattr(sys, "_gkd_notes_opened", False):
        sys.addaudithook(_note)
        sys._gkd_notes_opened = True
    _opened.clear()
    return _opened


def write_parquet(path, columns, kinds):
    """A Parquet file whose metadata, as datasets writes it, says that the columns `kinds` are of these kinds."""
    table = pa.table(columns)
    features = Features({name: kinds.get(name) or Value("string") for name in columns})
    info = {"info": {"features": features.to_dict()}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("where", ["file", "address"])
def test_a_path_in_a_row_is_not_opened(tmp_path, opened, capsys, where, streaming):
    secret = tmp_path / "private.png"
    secret.write_text("private")
    place = str(secret) if where == "file" else "http://127.0.0.1:9/private.png"
    cells = pa.array([{"bytes": None, "path": place}] * 2, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    columns = {"prompt": ["one?", "two?"], "completion": ["1", "2"], "picture": cells}
    path = write_parquet(tmp_path / "rows.parquet", columns, {"picture": Image()})
    opened.clear()
    rows = load_rows(path, "train", streaming=streaming)
    check_rows(rows, path, needs_answers=True)
    assert list(rows) == [{"prompt": "one?", "completion": "1"}, {"prompt": "two?", "completion": "2"}]
    assert "rows.parquet: left out, being no text: picture." in capsys.readouterr().err
    convert_data.main([path, "-o", str(tmp_path / "converted.jsonl")])
    said = "".join(opened)
    assert "rows.parquet" in said
    assert "private.png" not in said
    assert "127.0.0.1" not in said


@pytest.mark.parametrize("nested", [False, True])
def test_a_path_in_a_column_that_is_needed_is_refused(tmp_path, opened, nested):
    secret = tmp_path / "private.png"
    secret.write_text("private")
    cell = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    value = {"bytes": None, "path": str(secret)}
    kind, cells = Image(), pa.array([value], cell)
    if nested:
        kind = [{"role": Value("string"), "content": Image()}]
        message = pa.struct({"role": pa.string(), "content": cell})
        cells = pa.array([[{"role": "user", "content": value}]], pa.list_(message))
    name = "messages" if nested else "prompt"
    path = write_parquet(tmp_path / "rows.parquet", {name: cells}, {name: kind})
    opened.clear()
    with pytest.raises(DataError, match=f"column '{name}' holds images, sound or other files; gkd reads text only"):
        load_rows(path, "train")
    assert "private.png" not in "".join(opened)


@pytest.mark.parametrize("saved_to_disk", [False, True])
def test_a_folder_of_images_is_not_opened(tmp_path, opened, saved_to_disk):
    folder = tmp_path / "folder"
    if saved_to_disk:
        data = Dataset.from_dict({"text": ["a"], "image": [{"path": str(tmp_path / "private.png"), "bytes": None}]})
        data = data.cast(Features({"text": Value("string"), "image": Image()}))
        (tmp_path / "private.png").write_text("private")
        data.save_to_disk(folder)
    else:
        folder.mkdir()
        for number in range(3):
            (folder / f"private{number}.png").write_text("private")
    opened.clear()
    said = "row 0: neither `messages` nor `prompt`" if saved_to_disk else "column 'image' holds images"
    with pytest.raises(DataError, match=said):
        check_rows(load_rows(str(folder), "train"), str(folder), needs_answers=False)
    assert "private" not in "".join(opened)


def test_a_hub_dataset_that_names_files_is_converted_without_them(tmp_path, opened, monkeypatch):
    (tmp_path / "private.png").write_text("private")
    cells = [{"path": str(tmp_path / "private.png"), "bytes": None}]
    features = Features({"prompt": Value("string"), "image": Image()})
    data = Dataset.from_dict({"prompt": ["a"], "image": cells}).cast(features).to_iterable_dataset()
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: data)
    opened.clear()
    convert_data.main(["theirs/rows", "-o", str(tmp_path / "rows.jsonl")])
    assert json.loads((tmp_path / "rows.jsonl").read_text())["messages"][0]["content"] == "a"
    assert "private" not in "".join(opened)
