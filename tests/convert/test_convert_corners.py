"""convert_data.py in the corners: what a row, a folder or a file holds reaches the output or is named; what stops it
leaves nothing behind."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
from converting import chat, convert, rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from progress import finish, wait_until
from tiny import REPO

from gkd.convert.packed import zstd
from gkd.data import json_rows
from gkd.data.loading import load_rows

DATA = REPO / "data"
SYSTEM = [{"role": "system", "content": "s"}]


def summary(capsys):
    """The printed output, as one line."""
    return " ".join(capsys.readouterr().out.split())


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "convert_data.py", *map(str, arguments)],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# ---------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("row", "messages", "said"),
    [
        ({"instruction": "q", "output": "", "response": "a"}, chat("q", "a"), ""),
        (
            {"instruction": "q", "output": "a", "response": "b"},
            chat("q", "a"),
            "'response' differs from 'output', which",
        ),
        (
            {"instruction": "q", "output": "a", "text": "t"},
            chat("q", "a"),
            "'text' is not used: 1 rows, the first is ",
        ),
        ({"question": "q", "answer": "a", "context": "c"}, chat("q\nc", "a"), ""),
        ({"question": "q", "answer": "a", "context": {"c": 1}}, chat("q", "a"), "'context' is not used"),
        ({"question": "q", "target": "a", "metadata": {"k": 0}}, chat("q", "a"), "'metadata' is not used"),
        ({"question": "q", "target": 0}, chat("q", ""), "'target' is not used"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, chat("q", "a"), "'rejected' is not used"),
        ({"system_prompt": "s", "question": "q", "response": "a"}, SYSTEM + chat("q", "a"), ""),
        ({"messages": "", "prompt": "q", "completion": "a"}, chat("q", "a"), ""),
        (
            {"messages": chat("q", "a"), "prompt": "other"},
            chat("q", "a"),
            "'prompt' differs from 'messages', which is",
        ),
        ({"messages": chat("q", "a"), "prompt": "<u>q</u>"}, chat("q", "a"), ""),
        ({"messages": chat("q", "a"), "prompt": "q", "chosen": "a"}, chat("q", "a"), "'chosen' is not used"),
        ({"messages": [{"role": "system", "content": ""}, *chat("q", "a")]}, "itself", ""),
        ({"system": "s", "conversations": [{"from": "human", "value": "q"}]}, SYSTEM + chat("q", ""), ""),
        (
            {"system": "t", "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]},
            SYSTEM + chat("q", ""),
            "the column of system prompts differs from the system turn, which is used",
        ),
        (
            {"system": "s", "conversations": [{"from": "system", "value": ""}, {"from": "human", "value": "q"}]},
            SYSTEM + chat("q", ""),
            "",
        ),
    ],
)
def test_columns_are_used_or_named(tmp_path, capsys, row, messages, said):
    (tmp_path / "in.json").write_text(json.dumps([row]))
    assert convert(tmp_path / "in.json", "-o", tmp_path / "out.json") == 0
    assert rows(tmp_path / "out.json")[0]["messages"] == (row["messages"] if messages == "itself" else messages)
    text = summary(capsys)
    assert said in text
    assert said or "left out" not in text


def test_a_part_that_is_no_text_is_refused_though_it_has_a_caption(tmp_path, capsys):
    row = {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a cat"}]}]}
    (tmp_path / "in.json").write_text(json.dumps([row]))
    assert convert(tmp_path / "in.json", "-o", tmp_path / "out.json") == 1
    assert "a part that is not text ('image_url')" in capsys.readouterr().err


NAMES = (
    "messages conversations instruction input context prompt completion output response answer question query system "
    "system_prompt target chosen metadata history id"
).split()
unique = st.integers(0, 10**9).map(lambda number: f"text-{number}")
cells = st.one_of(
    st.none(),
    st.just(""),
    st.just(0),
    unique,
    unique.map(lambda text: {"key": text}),
    st.tuples(unique, unique).map(lambda texts: chat(*texts)),
    st.tuples(unique, unique).map(
        lambda texts: [{"from": "human", "value": texts[0]}, {"from": "gpt", "value": texts[1]}]
    ),
    st.tuples(unique, unique).map(lambda texts: [list(texts)]),
)


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.dictionaries(st.sampled_from(NAMES), cells, min_size=1, max_size=6), min_size=1, max_size=4))
def test_what_goes_in_comes_out_or_is_named(tmp_path, capsys, data):
    """Any columns with any cells: each text is in the output, in a bad row, or in a column that the summary names."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    out, bad = tmp_path / "out.jsonl", tmp_path / "bad.jsonl"
    for path in (out, bad):
        path.unlink(missing_ok=True)
    code = convert(tmp_path / "in.jsonl", "-o", out, "--on-bad", "collect", bad)
    said = capsys.readouterr()
    assert code in (0, 1)
    assert "Traceback" not in said.err
    written = (out.read_text() if code == 0 else "") + bad.read_text()
    arrived, named = set(re.findall(r"text-\d+", written)), " ".join(said.out.split())
    for row in data:
        for column, cell in row.items():
            if not arrived.issuperset(re.findall(r"text-\d+", json.dumps(cell))):
                system = column in ("system", "system_prompt") and "the column of system prompts differs" in named
                assert f"'{column}' is not used" in named or f"'{column}' differs" in named or system, (row, column)
    count = len(out.read_text().splitlines()) if code == 0 else 0
    assert count + len(bad.read_text().splitlines()) == len(data)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(values, max_size=5), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans(), st.data())
def test_json_read_in_chunks_is_json_read_at_once(data, chunk, indent, ascii_only, draw):
    text = json.dumps(data, indent=indent, ensure_ascii=ascii_only)
    lines = "\n".join(json.dumps(value, indent=indent, ensure_ascii=ascii_only) for value in data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK", chunk)
        for source, array in ((text, True), (lines, False)):
            read = list(json_rows.JsonStream(io.StringIO(source), array))
            assert repr(read) == repr([(value, None) for value in data])
        cut = draw.draw(st.integers(0, len(text) - 1))
        with pytest.raises(json.JSONDecodeError):
            list(json_rows.JsonStream(io.StringIO(text[:cut]), True))
        with pytest.raises(json.JSONDecodeError):
            list(json_rows.JsonStream(io.StringIO(text + " x"), True))


# ---------------------------------------------------------------------- files and folders


@pytest.mark.parametrize(
    ("ending", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd.compress)]
)
def test_packed_files_and_their_damage(tmp_path, capsys, ending, pack):
    content = b"".join(b'{"prompt": "%d"}\n' % number for number in range(20_000))
    path, out = tmp_path / f"in.jsonl.{ending}", tmp_path / "out.jsonl"
    path.write_bytes(pack(content) + pack(b'{"prompt": "of a second stream"}\n'))
    assert convert(path, "-o", out) == 0
    assert len(out.read_text().splitlines()) == 20_001
    packed = pack(content)
    for damaged in (packed[: len(packed) // 2], packed[:-3], packed + b"something else"):
        path.write_bytes(damaged)
        assert convert(path, "-o", out, "--overwrite") == 1
        assert "broken" in capsys.readouterr().err


def test_zip_archives(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/one.jsonl", '{"prompt": "1"}\n')
        archive.writestr("two.txt.gz", gzip.compress(b"2\n"))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/one.jsonl", '{"prompt": "of the same name"}\n')
        archive.writestr("readme.md", "hello")
        archive.writestr("__MACOSX/._one.jsonl", "x")
    assert convert(tmp_path / "in.zip", "-o", tmp_path / "out.json") == 0
    asked = [row["prompt"][0]["content"] for row in rows(tmp_path / "out.json")]
    assert asked == ["1", "2", "of the same name"]
    text = summary(capsys)
    assert "in.zip/readme.md: another kind of file" in text
    assert "in.zip/__MACOSX/._one.jsonl: hidden" in text
    (tmp_path / "in.zip").write_bytes((tmp_path / "in.zip").read_bytes()[:-30])
    assert convert(tmp_path / "in.zip", "-o", tmp_path / "out.json", "--overwrite") == 1
    assert "in.zip: broken zip file" in capsys.readouterr().err


@contextlib.contextmanager
def nobody():
    """Runs without root's right to read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_what_is_not_read_in_a_folder_is_named(tmp_path, capsys):
    with tempfile.TemporaryDirectory() as base:  # which anybody can reach
        os.chmod(base, 0o777)
        folder, out = Path(base, "folder"), Path(base, "out.json")
        (folder / "closed").mkdir(parents=True)
        (folder / ".cache").mkdir()
        for name in ("a.txt", "notes.md", ".cache/b.txt", "closed/c.txt"):
            (folder / name).write_text("hello\n")
        (folder / "gone.txt").symlink_to("nowhere.txt")
        (folder / "loop").symlink_to(folder)
        Path(base, "elsewhere").mkdir()
        Path(base, "elsewhere/d.txt").write_text("of a linked folder\n")
        (folder / "linked").symlink_to("../elsewhere")
        os.mkfifo(folder / "pipe.txt")
        (folder / "closed").chmod(0)
        with nobody():
            assert convert(folder, "-o", out) == 0
        (folder / "closed").chmod(0o755)
        assert [row["prompt"][0]["content"] for row in rows(out)] == ["hello", "of a linked folder"]
        text = summary(capsys)
        for reason in (
            "closed: Permission denied",
            "gone.txt: a broken link",
            "loop: a link to a folder that is read already",
            "pipe.txt: no regular file",
            "notes.md: another kind of file",
            ".cache: hidden",
        ):
            assert reason in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("folder", "-o", "folder/out.json"), "folder/out.json lies in the input folder"),
        (("folder/a.jsonl", "-o", "folder/a.jsonl"), "folder/a.jsonl is an input too"),
        (("folder/a.jsonl", "-o", "o.json", "--on-bad", "collect", "folder/a.jsonl"), "is an input too"),
        (("a.heldout.json", "-o", "a.json", "--split", "0.5"), "a.heldout.json is an input too"),
        (("folder", "-o", "link.jsonl"), "link.jsonl is an input too"),
        (("pipe.jsonl", "-o", "o.json"), "pipe.jsonl is no regular file"),
        (("folder", "-o", "pipe.jsonl"), "pipe.jsonl is no regular file"),
    ],
)
def test_an_output_that_is_read_and_an_input_that_is_no_file(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for name in ("folder/a.jsonl", "a.heldout.json"):
        Path(name).write_text('{"prompt": "a"}\n')
    Path("link.jsonl").hardlink_to("folder/a.jsonl")
    os.mkfifo("pipe.jsonl")
    before = sorted(tmp_path.rglob("*"))
    assert convert(*flags, "--overwrite") == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("folder/a.jsonl").read_text() == '{"prompt": "a"}\n'


# ---------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ไทย: สวัสดีครับ\n".encode("tis-620"), "name its encoding by --encoding"),  # Chinese enough to pass for GB18030
        ("สวัสดีครับ วันนี้อากาศดีมาก\nประเทศไทยมีอาหารอร่อยมากมาย\n".encode("tis-620"), "(perhaps cp874, Thai)"),
        ("why is it so?\n".encode("utf-16-le"), "such as utf-16-le"),
    ],
)
def test_encodings_that_are_asked_for(tmp_path, capsys, content, message):
    (tmp_path / "in.txt").write_bytes(content)
    assert convert(tmp_path / "in.txt", "-o", tmp_path / "out.json") == 1
    assert message in capsys.readouterr().err


def test_a_mark_at_the_start_is_no_text(tmp_path):
    for encoding, named in (("utf-8-sig", "utf-8"), ("utf-16", "utf-16-le"), ("utf-32", None)):
        (tmp_path / "in.csv").write_bytes("prompt\nwhy?\n".encode(encoding))
        flags = ["--encoding", named] if named else []
        assert convert(tmp_path / "in.csv", "-o", tmp_path / "out.json", "--overwrite", *flags) == 0, encoding
        assert rows(tmp_path / "out.json")[0]["messages"] == chat("why?", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('say "hi"\t"Hello" he said\n', [('say "hi"', '"Hello" he said')]),
        ('"a\tx\n b"\ty\n', [('"a', "x"), (' b"', "y")]),  # quoted, it would be one row
        ('"Hello"\tsay "hi"\n', [('"Hello"', 'say "hi"')]),
        ('"Hello"\thi\n', [("Hello", "hi")]),
        ('"say ""hi"""\t"two\nlines"\n', [('say "hi"', "two\nlines")]),
    ],
)
def test_quotes_in_tsv(tmp_path, capsys, text, expected):
    path = tmp_path / "in.tsv"
    path.write_text("prompt\tcompletion\n" + text)
    assert convert(path, "-o", tmp_path / "out.json") == 0
    assert [tuple(m["content"] for m in row["messages"]) for row in rows(tmp_path / "out.json")] == expected
    assert [(row["prompt"], row["completion"]) for row in load_rows(str(path), "train")] == expected


def test_long_strings_and_deep_rows_take_linear_time(tmp_path, capsys):
    text = '\\"' * 5_000_000
    (tmp_path / "in.json").write_text(f'[{{"prompt": "{text}"}}]')
    started = time.process_time()
    assert convert(tmp_path / "in.json", "-o", tmp_path / "out.json") == 0
    assert len(rows(tmp_path / "out.json")[0]["prompt"][0]["content"]) == 5_000_000
    deep = '{"prompt": "b", "x": ' + '["]",' * 100_000 + "[]" + "]" * 100_000 + "}"
    (tmp_path / "in.json").write_text(f'[{{"prompt": "a"}}, {deep}, {{"prompt": "c"}}]')
    flags = ["-o", tmp_path / "out.json", "--overwrite"]
    assert convert(tmp_path / "in.json", *flags) == 1
    assert "row 1: nested too deeply: 100,002 levels" in capsys.readouterr().err
    assert convert(tmp_path / "in.json", *flags, "--on-bad", "collect", tmp_path / "bad.jsonl") == 0
    assert [row["prompt"][0]["content"] for row in rows(tmp_path / "out.json")] == ["a", "c"]
    assert json.loads((tmp_path / "bad.jsonl").read_text())["row"] == deep
    assert time.process_time() - started < 10  # 3 s; what is quadratic takes minutes


# ---------------------------------------------------------------------- what stops it


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_leave_nothing_behind(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 3_000_000, 1))
    process = command(tmp_path / "in", "-o", tmp_path / "out.parquet", "--on-bad", "collect", tmp_path / "bad.jsonl")
    wait_until(lambda: len(list(tmp_path.glob(".*.partial"))) == 2, process)
    process.send_signal(getattr(signal, name))
    _, errors = finish(process)
    assert process.returncode == 128 + getattr(signal, name)
    assert errors.strip() == f"convert_data.py: stopped by {name.replace('SIGINT', 'Ctrl-C')}."
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{}\n')
    assert convert("~/in.jsonl", "-o", "~/out.json", "--on-bad", "collect", "~/bad.jsonl", "--plot", "~/p.png") == 0
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["bad.jsonl", "in.jsonl", "out.json", "p.png"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_full_disk(tmp_path, suffix):
    """A limit on the size of files stands for a full disk: the write fails in the same place."""
    (tmp_path / "in.jsonl").write_text("".join(f'{{"prompt": "{number * 7919}"}}\n' for number in range(30_000)))
    limit = (300_000, 300_000)
    out = tmp_path / f"out{suffix}"
    process = command(
        tmp_path / "in.jsonl", "-o", out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    _, errors = finish(process)
    assert (process.returncode, errors) == (1, f"convert_data.py: {out}: File too large\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_terminals_that_lack_characters_and_readers_that_leave(tmp_path):
    source = DATA / "sample_alpaca_zh.json"
    # Wide enough for the path of any clone: a table's "…" would be no UTF-8.
    terminal = {"PYTHONIOENCODING": "cp1252", "COLUMNS": "300"}
    process = command(source, "-o", tmp_path / "a.json", env={**os.environ, **terminal})
    said, errors = finish(process)
    assert (process.returncode, errors) == (0, "")
    assert "\\u" in said
    process = command(source, "-o", tmp_path / "b.json")
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 1)
    assert (tmp_path / "b.json").read_bytes() == (DATA / "sample_answers.json").read_bytes()
