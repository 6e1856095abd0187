"""convert_data.py as a command."""

import json
import subprocess
import sys

import pytest
from conftest import REPO

DATA = REPO / "data"
SYSTEM = "帮我把下面中文翻译成英文"


def convert(*arguments):
    return subprocess.run([sys.executable, REPO / "convert_data.py", *arguments], capture_output=True, text=True)


def test_users_sample_byte_for_byte(tmp_path):
    out = tmp_path / "out.json"
    done = convert(
        DATA / "sample_translation_pairs.jsonl",
        "-o",
        out,
        "--source-field",
        "zh",
        "--system",
        SYSTEM,
        "--drop-answers",
    )
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == (DATA / "sample_translation.json").read_bytes()
    assert "2 rows (translation), 2 with an empty answer" in done.stdout


def test_alpaca(tmp_path):
    out = tmp_path / "out.json"
    assert convert(DATA / "sample_alpaca_zh.json", "-o", out).returncode == 0
    assert out.read_bytes() == (DATA / "sample_answers.json").read_bytes()
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert rows[1]["messages"][0]["content"] == "把下面的句子改写得更礼貌。\n快点把文件发给我。"
    assert [m["role"] for m in rows[2]["messages"]] == ["user", "assistant", "user", "assistant"]
    assert rows[3]["messages"][0] == {"role": "system", "content": "你是一个简洁的助手。"}
    assert all(row["prompt"] == row["messages"][:-1] for row in rows)
    assert "\\u" not in out.read_text(encoding="utf-8")


def test_byte_order_mark_and_target(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + '{"zh": "好", "en": "good"}\n'.encode())
    assert (
        convert(
            tmp_path / "in.jsonl", "-o", tmp_path / "o.json", "--source-field", "zh", "--target-field", "en"
        ).returncode
        == 0
    )
    (row,) = json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))
    assert row["messages"][-1] == {"role": "assistant", "content": "good"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"instruction": "a", "output": "b"}, {"output": "b"}]', "in.json, row 1: no field 'instruction'"),
        ('[{"instruction": "a", "output": 3}]', "in.json, row 0: 'output' must be text, not int"),
        ('[{"instruction": " ", "output": "b"}]', "in.json, row 0: 'instruction' is empty"),
        ('[{"instruction": "a"},\n{]', "in.json, line 2, column 2: broken JSON"),
        ('{"instruction": "a"}\n{"instruction": \n', "in.json, line 2: broken JSON"),
        ("[1]", "in.json, row 0: must be an object, not int"),
        ('[{"text": "a"}]', "in.json, row 0: unknown format"),
        (
            '[{"instruction": "a", "history": [["q"]]}]',
            "in.json, row 0: 'history' must be a list of [question, answer]",
        ),
        ("[]", "in.json: no rows"),
    ],
)
def test_bad_rows_leave_nothing(tmp_path, content, message):
    (tmp_path / "in.json").write_text(content)
    done = convert(tmp_path / "in.json", "-o", tmp_path / "out.json")
    assert done.returncode == 1
    assert message in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["in.json"]


def test_usage(tmp_path):
    (tmp_path / "out.json").write_text("precious")
    assert convert(DATA / "sample_alpaca_zh.json", "-o", tmp_path / "out.json").returncode == 2
    assert (tmp_path / "out.json").read_text() == "precious"
    assert convert(DATA / "sample_alpaca_zh.json", "-o", tmp_path / "out.json", "--overwrite").returncode == 0
    assert convert("nowhere.json", "-o", tmp_path / "o2.json").returncode == 2
