"""convert_data.py: every format, compression and encoding; how it handles bad rows; which rows it keeps."""

import csv
import gzip
import json
import random
import subprocess
import sys

import pytest
from converting import chat, convert, rows
from corrupt import corruptions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import REPO

from gkd.convert.packed import zstd
from gkd.data.loading import check_rows, load_rows

DATA = REPO / "data"
SYSTEM = "帮我把下面中文翻译成英文"
PAIRS = ("--source-field", "zh", "--target-field", "en")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def test_users_sample_byte_for_byte(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "convert_data.py", "data/sample_translation_pairs.jsonl", "-o", out]
    command += ["--source-field", "zh", "--system", SYSTEM, "--drop-answers"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == (DATA / "sample_translation.json").read_bytes()
    assert "2 rows, 2 with an empty answer" in done.stdout
    assert "translation rows by --source-field zh" in " ".join(done.stdout.replace("│", " ").split())


def test_alpaca_sample(tmp_path):
    out = tmp_path / "out.json"
    assert convert(DATA / "sample_alpaca_zh.json", "-o", out) == 0
    assert out.read_bytes() == (DATA / "sample_answers.json").read_bytes()
    assert all(row["prompt"] == row["messages"][:-1] for row in rows(out))


EXPECTED = {
    "alpaca.json": [
        chat("Translate into Chinese.\nGood morning.", "早上好。"),
        [
            {"role": "system", "content": "Answer briefly."},
            *chat("Name an even number.", "4", "Name a prime number.", "7"),
        ],
    ],
    "sharegpt.json": [
        chat("《红楼梦》是谁写的?", "是曹雪芹写的。"),
        [
            {"role": "system", "content": "You look things up."},
            {"role": "user", "content": "Weather in Oslo?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "4 degrees, rain"},
            {"role": "assistant", "content": "4 degrees and rain."},
        ],
    ],
    "messages.jsonl": [
        chat("What is 2 + 2?", "4"),
        [
            {"role": "user", "content": "东京现在是几点?", "name": "Ann"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "time", "arguments": {"city": "东京"}}}
                ],
            },
            {"role": "tool", "content": "09:30", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Half past nine."},
        ],
    ],
    "prompt_completion.csv": [chat('Spell "cat", backwards.', "tac"), chat("Two lines:\nsay them.", "一, 二")],
    "question_answer.tsv": [chat("Capital of France?", "Paris"), chat("首都是哪里?", "北京")],
    "translation.jsonl": [
        chat("今天天气很好。", "The weather is fine today."),
        chat("谢谢你的帮助。", "Thank you for your help."),
    ],
    "prompts.txt": [chat("Write a haiku about rain.", ""), chat("用一句话介绍杭州。", "")],
    "prompt_only.jsonl": [
        chat("Name three rivers.", ""),
        [{"role": "system", "content": "Be brief."}, *chat("Why is the sky blue?", "")],
    ],
}


def flags(name):
    return PAIRS if name.startswith("translation") else ()


@pytest.mark.parametrize("name", sorted(p.name for p in (DATA / "formats").iterdir()))
def test_each_format_compression_and_encoding(tmp_path, name):
    plain = tmp_path / "plain.json"
    assert convert(DATA / "formats" / name, "-o", plain, *flags(name)) == 0
    assert [row["messages"] for row in rows(plain)] == EXPECTED[name]
    check_rows(load_rows(str(plain), "train"), str(plain), needs_answers=False)  # train_gkd.py reads it
    text = (DATA / "formats" / name).read_text(encoding="utf-8")
    forms = {f"{e}-{name}": text.encode(e) for e in ("utf-8-sig", "utf-16", "gb18030")}
    forms[f"crlf-{name}"] = text.replace("\n", "\r\n").encode()
    forms |= {f"{form}.gz": gzip.compress(content) for form, content in dict(forms).items()}
    forms |= {f"{form}.zst": zstd.compress(content) for form, content in forms.items() if not form.endswith(".gz")}
    for form, content in forms.items():
        (tmp_path / form).write_bytes(content)
        out = tmp_path / f"{form}.json"
        assert convert(tmp_path / form, "-o", out, *flags(name)) == 0, form
        if form.startswith("crlf") and "prompt_completion" in name:
            assert [row["messages"][-1] for row in rows(out)] == [m[-1] for m in EXPECTED[name]]
        else:
            assert out.read_bytes() == plain.read_bytes(), form


def test_parquet_folder_and_pipe(tmp_path):
    source = DATA / "sample_alpaca_zh.json"
    assert convert(source, "-o", tmp_path / "a.parquet") == 0
    assert convert(tmp_path / "a.parquet", "-o", tmp_path / "b.json") == 0
    assert rows(tmp_path / "b.json") == rows(DATA / "sample_answers.json")
    (tmp_path / "folder/deep").mkdir(parents=True)
    (tmp_path / "folder/one.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "folder/deep/two.txt").write_text("b\n")
    assert convert(tmp_path / "folder", "-o", tmp_path / "c.json") == 0
    assert sorted(row["prompt"][0]["content"] for row in rows(tmp_path / "c.json")) == ["a", "b"]
    piped = [sys.executable, "convert_data.py", "-", "-o", tmp_path / "d.json"]
    done = subprocess.run(piped, cwd=REPO, input=gzip.compress(source.read_bytes()), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "d.json").read_bytes() == (DATA / "sample_answers.json").read_bytes()
    piped[-1] = tmp_path / "e.json"
    done = subprocess.run(piped, cwd=REPO, input=b"why?\nhow?\n", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [row["prompt"][0]["content"] for row in rows(tmp_path / "e.json")] == ["why?", "how?"]


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
conversations = st.lists(st.tuples(words, words), min_size=1, max_size=3).flatmap(
    lambda turns: st.builds(
        lambda system, last: [
            *([{"role": "system", "content": system}] if system else []),
            *chat(*[text for turn in turns for text in turn][:-1], last),
        ],
        st.none() | words,
        st.just("") | words,
    )
)


@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(conversations, min_size=1, max_size=5),
    st.sampled_from([".json", ".jsonl", ".parquet"]),
    st.sampled_from([[], ["--prompt-completion"]]),
)
def test_round_trip_and_idempotence(tmp_path, data, suffix, columns):
    first, second, back = tmp_path / f"1{suffix}", tmp_path / f"2{suffix}", tmp_path / "back.json"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in data))
    assert convert(tmp_path / "in.jsonl", "-o", first, "--overwrite", *columns) == 0
    assert convert(first, "-o", second, "--overwrite", *columns) == 0
    assert convert(first, "-o", back, "--overwrite") == 0
    expected = {"prompt", "completion"} if columns else {"messages", "prompt"}
    assert set(load_rows(str(first), "train").column_names) == expected
    assert [row["messages"] for row in rows(back)] == data
    if suffix != ".parquet":
        assert first.read_bytes() == second.read_bytes()
        assert "\\u4" not in first.read_text(encoding="utf-8")


def test_corrupted_files(tmp_path, capsys):
    """200 files: an exit code of 1, the place of the trouble, no traceback, and nothing written."""
    for name, content, place in corruptions(random.Random(0), 200):
        path = tmp_path / name
        path.write_bytes(content)
        code = convert(path, "-o", tmp_path / "out.json")
        said = capsys.readouterr().err
        assert code == 1, (name, code)
        assert said.startswith(f"convert_data.py: {path}{place}"), (name, said)
        assert len(said) < 2000
        path.unlink()
        assert list(tmp_path.iterdir()) == [], name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"instruction": "a", "output": "b"}, {"output": "b"}]', "in.json, row 1: no 'instruction'"),
        ('[{"instruction": "a", "output": 3}]', "in.json, row 0: 'output' must be text, not int"),
        ('[{"instruction": "a"},\n{]', "in.json, row 1: broken JSON"),
        ('{"instruction": "a"}\n{"instruction": \n', "in.json, line 2: broken JSON"),
        ('{"instruction": "a", "instruction": "b"}\n', "in.json, line 1: the key 'instruction' appears twice"),
        ('[{"text": "a"}]', "in.json, row 0: unknown format: the row has 'text'"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "in.json, line 1: its text is not Unicode: half"),
        (
            '{"messages": [{"role": "king", "content": "a"}]}',
            "in.json, line 1: messages[0] has the unknown role 'king'",
        ),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "a part that is not text ('image')"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "in.json, line 1: nobody asks anything"),
        ("[]", "in.json: no rows"),
    ],
)
def test_what_bad_rows_are_told(tmp_path, capsys, content, message):
    (tmp_path / "in.json").write_text(content)
    assert convert(tmp_path / "in.json", "-o", tmp_path / "out.json") == 1
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in.json"]


def test_half_a_surrogate_pair_deep_in_an_array(tmp_path):
    emoji = [{"prompt": "🙂" * 5000 + str(i)} for i in range(40)]  # escaped pairs, cut by many chunks
    (tmp_path / "in.json").write_text(json.dumps([*emoji, {"prompt": "\udc00"}, {"prompt": "x\ud800"}, *emoji]))
    out, bad = tmp_path / "out.json", tmp_path / "bad.jsonl"
    assert convert(tmp_path / "in.json", "-o", out, "--on-bad", "collect", bad) == 0
    assert [row["prompt"][0]["content"] for row in rows(out)] == [row["prompt"] for row in emoji * 2]
    assert [json.loads(line)["place"].rsplit(" ", 1)[1] for line in bad.read_text().splitlines()] == ["40", "41"]


def test_skip_and_collect(tmp_path, capsys):
    lines = ['{"prompt": "a"}', '{"prompt": 3}', "{broken", '{"prompt": "b\\udc00"}', '{"prompt": "c"}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    out, bad = tmp_path / "out.json", tmp_path / "bad.jsonl"
    assert convert(tmp_path / "in.jsonl", "-o", out, "--on-bad", "collect", bad) == 0
    assert [row["prompt"][0]["content"] for row in rows(out)] == ["a", "c"]
    collected = [json.loads(line) for line in bad.read_text().splitlines()]
    assert [row["place"].rsplit(" ", 1)[1] for row in collected] == ["2", "3", "4"]
    assert collected[0]["row"] == {"prompt": 3}
    assert "3 bad rows left out" in capsys.readouterr().out
    assert convert(tmp_path / "in.jsonl", "-o", out, "--on-bad", "skip", "--overwrite") == 0
    assert len(rows(out)) == 2


def numbered(tmp_path, name, count):
    path = tmp_path / name
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], *([f"{name} {i}?", i] for i in range(count))])
    return path


def test_dedupe_limit_shuffle_and_drop_answers(tmp_path):
    (tmp_path / "in.txt").write_text("one two\none  two\none two\nthree\nfour\n")  # the third holds a wide space
    out = tmp_path / "out.json"
    assert convert(tmp_path / "in.txt", "-o", out, "--dedupe", "--limit", 2) == 0
    assert [row["prompt"][0]["content"] for row in rows(out)] == ["one two", "three"]
    source = numbered(tmp_path, "a.csv", 50)
    for seed, name in ((1, "s1.json"), (1, "s2.json"), (2, "s3.json")):
        assert convert(source, "-o", tmp_path / name, "--shuffle", "--seed", seed, "--drop-answers") == 0
    first, again, other = (rows(tmp_path / f"s{i}.json") for i in (1, 2, 3))
    assert first == again != other
    asked = [row["prompt"][0]["content"] for row in first]
    assert sorted(asked) == sorted(f"a.csv {i}?" for i in range(50)) != asked
    assert all(row["messages"][-1] == {"role": "assistant", "content": ""} for row in first)


def test_mix_takes_proportions_and_repeats_nothing(tmp_path):
    a, b = numbered(tmp_path, "a.csv", 100), numbered(tmp_path, "b.csv", 30)
    out = tmp_path / "out.json"
    assert convert("-o", out, "--mix", f"{a}:0.7", f"{b}:0.3") == 0
    asked = [row["prompt"][0]["content"] for row in rows(out)]
    assert len(asked) == len(set(asked)) == 100
    assert sum(text.startswith("b.csv") for text in asked) == 30


def test_split_is_stable_when_the_file_grows(tmp_path):
    small, large = numbered(tmp_path, "a.csv", 200), tmp_path / "large.csv"
    large.write_text(small.read_text() + "".join(f"more {i}?,{i}\n" for i in range(300)))
    for path in (small, large):
        assert convert(path, "-o", tmp_path / f"{path.stem}.json", "--split", 0.2) == 0
    held = [{r["prompt"][0]["content"] for r in rows(tmp_path / f"{n}.heldout.json")} for n in ("a", "large")]
    kept = [{r["prompt"][0]["content"] for r in rows(tmp_path / f"{n}.json")} for n in ("a", "large")]
    assert 20 < len(held[0]) < 60
    assert held[0] <= held[1]
    assert not held[1] & (kept[0] | kept[1])


def test_token_lengths(tmp_path, saved, capsys):
    source, out = numbered(tmp_path, "a.csv", 20), tmp_path / "out.json"
    plot = tmp_path / "rows.png"
    assert convert(source, "-o", out, "--tokenizer", saved / "student", "--plot", plot) == 0
    assert "tokens █" in capsys.readouterr().out
    assert plot.stat().st_size > 1000
    limit = ["--tokenizer", saved / "student", "--max-tokens", 25, "--overwrite"]
    long = tmp_path / "long.txt"
    long.write_text("short\n" + "long " * 100 + "\n")
    assert convert(long, "-o", out, *limit) == 0
    assert [row["prompt"][0]["content"] for row in rows(out)] == ["short"]
    assert "dropped by --max-tokens" in capsys.readouterr().out


def test_usage(tmp_path):
    (tmp_path / "out.json").write_text("precious")
    sample = DATA / "sample_alpaca_zh.json"
    assert convert(sample, "-o", tmp_path / "out.json") == 2
    assert (tmp_path / "out.json").read_text() == "precious"
    assert convert(sample, "-o", tmp_path / "out.json", "--overwrite") == 0
    assert convert("nowhere.json", "-o", tmp_path / "o2.json") == 2
    assert convert(sample, "-o", tmp_path / "o2.xml") == 2
    assert convert(sample, "-o", tmp_path / "o2.json", "--max-tokens", 9) == 2
    assert convert("-o", tmp_path / "o2.json", "--mix", "a", "b:1") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_half_a_pair_at_the_border_of_what_is_read_at_once(tmp_path):
    for shift in range(16):
        path = tmp_path / f"{shift}.json"
        filler = "x" * (65536 - 24 + shift)
        path.write_text('[{"prompt": "' + filler + '\\ud800"}' + ', {"prompt": "\\ud83d\\ude42"}' * 9000 + "]")
        assert convert(path, "-o", tmp_path / "out.json", "--on-bad", "skip", "--overwrite") == 0
        assert {row["prompt"][0]["content"] for row in rows(tmp_path / "out.json")} == {"🙂"}, shift


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"instruction": "q", "context": "c", "response": "a"}, "q\nc", "a"),
        ({"prompt": "q", "answer": "a"}, "q", "a"),
        ({"question": "q", "answer": None, "response": "a"}, "q", "a"),
        ({"question": None, "query": "q"}, "q", ""),
    ],
)
def test_columns_by_other_names(tmp_path, row, question, answer):
    (tmp_path / "in.json").write_text(json.dumps([row]))
    assert convert(tmp_path / "in.json", "-o", tmp_path / "out.json") == 0
    assert rows(tmp_path / "out.json")[0]["messages"] == chat(question, answer)


@pytest.mark.parametrize(
    ("content", "asked"),
    [
        ('{"prompt": "a"}{"prompt": "b"}', ["a", "b"]),
        ('{"prompt":\n "a"}\n{"prompt":\n "b"}\n', ["a", "b"]),
        ('[{"prompt": "a", "id": 123456789012345678901234}, {"prompt": "b"}]', ["a", "b"]),
    ],
)
def test_other_shapes_of_json(tmp_path, content, asked):
    (tmp_path / "in.json").write_text(content)
    assert convert(tmp_path / "in.json", "-o", tmp_path / "out.json") == 0
    assert [row["prompt"][0]["content"] for row in rows(tmp_path / "out.json")] == asked


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.txt", "안녕하세요 오늘 날씨\n".encode("euc-kr"), "name its encoding by --encoding"),
        ("in.txt", "Größe naïve café\n".encode("latin-1"), "name its encoding by --encoding"),
        ("in.txt", "hello\n".encode("utf-16")[:-1], "not utf-16 all through"),
        ("in.csv", b'prompt\n"why\nhow\nwho\n', "broken CSV"),
        ("in.json", b'[{"question": "a", "answer": "b"}, {"text": "c"}]', "row 1: no 'question'"),
        ("in.jsonl", b'{"messages": [{"role": "user", "content": "a", "x": NaN}]}', "line 1: JSON has no form for it"),
    ],
)
def test_files_that_are_refused(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert convert(tmp_path / name, "-o", tmp_path / "out.json") == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_bad_first_copy_does_not_take_the_good_one_along(tmp_path):
    (tmp_path / "in.jsonl").write_text(
        '{"prompt": "a", "completion": "\\ud800"}\n{"prompt": "a", "completion": "good"}\n'
    )
    assert convert(tmp_path / "in.jsonl", "-o", tmp_path / "o.json", "--on-bad", "skip", "--dedupe") == 0
    assert rows(tmp_path / "o.json")[0]["messages"][-1]["content"] == "good"


def test_nothing_but_bad_rows(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"prompt": 1}\n{"prompt": 2}\n')
    bad = tmp_path / "bad.jsonl"
    assert convert(tmp_path / "in.jsonl", "-o", tmp_path / "o.json", "--on-bad", "collect", bad) == 1
    assert "2 are bad, the first at" in capsys.readouterr().err
    assert len(bad.read_text().splitlines()) == 2
    missing = ["--tokenizer", tmp_path / "no", "--on-bad", "collect", tmp_path / "bad2.jsonl"]
    assert convert(tmp_path / "in.jsonl", "-o", tmp_path / "o.json", *missing) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "in.jsonl"]


def test_folders_take_data_files_only_and_stale_held_out_rows_go(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.TXT", "b.json.bak", ".c.txt", "d.md"):
        (folder / name).write_text("hello\n")
    out, stale = tmp_path / "o.json", tmp_path / "o.heldout.json"
    stale.write_text("of an earlier run")
    assert convert(folder, "-o", out, "--split", 1e-9, "--overwrite") == 0
    assert len(rows(out)) == 1
    assert not stale.exists()


def test_what_flags_leave_out_is_counted(tmp_path, capsys):
    assert convert(numbered(tmp_path, "a.csv", 50), "-o", tmp_path / "o.json", "--shuffle", "--limit", 5) == 0
    assert "dropped by --limit" in capsys.readouterr().out.replace("│", " ")


@pytest.mark.parametrize(
    "flags",
    [
        ("--encoding", "nonsense"),
        ("--limit", 0),
        ("--on-bad", "collect", "OUT"),
        ("--plot", "nowhere/p.png"),
        ("--on-bad", "perhaps"),
    ],
)
def test_wrong_usage_writes_nothing(tmp_path, flags):
    flags = [tmp_path / "o.json" if flag == "OUT" else flag for flag in flags]
    assert convert(DATA / "sample_alpaca_zh.json", "-o", tmp_path / "o.json", *flags) == 2
    assert convert("-o", tmp_path / "o.json", "--mix", "a.json:nan") == 2
    assert list(tmp_path.iterdir()) == []
