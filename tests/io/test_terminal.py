"""Text of rows, templates, models and records is shown literally: it neither acts on a terminal nor is read as markup."""

import io
import json
import re

import pytest
from markdown_it import MarkdownIt
from rich.table import Table
from rich.text import Text
from tiny import make_model, make_tokenizer

import convert_data
import train_gkd
from gkd.cli import chat
from gkd.io.console import Console, printable
from gkd.io.terminal import code_in_markdown, in_markdown, visible
from gkd.report.tables import print_results

HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\x7f\u202eabc[bold]x[/bold]"
SHOWN = r"\x1b[2J\x1b]0;owned\x07\x9b31m\x7f\u202eabc[bold]x[/bold]"
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_each_control_is_shown_and_nothing_else_is_touched():
    assert visible(HOSTILE) == SHOWN
    assert visible("\ud800\rx") == r"\ud800\rx"
    plain = "tab\t, newlines\n\r\n, ä漢 العربية 👩‍👩‍👧 \\x1b"
    assert visible(plain) == plain
    assert printable(HOSTILE) == Text(SHOWN)


def test_the_console_lets_nothing_through_that_was_forgotten():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=60, highlight=False)
    table = Table("a\x1b[2J", title="b\x1b[2J", caption="c\x1b[2J")
    table.add_row(Text("d\x1b[2J", style="red"))
    console.print(table, "e\x1b[2J", Text("f\x1b[2J"))
    console.rule("g\x1b[2J")
    assert "\x1b[2J" not in out.getvalue()
    for letter in "abcdefg":
        assert f"{letter}\\x1b[2J" in out.getvalue()
    assert "\x1b[31md" in out.getvalue()  # its own colours stay


def test_markdown_shows_text_as_it_is():
    hostile = "a | b\n\n# c <img src=x onerror=y> [d](javascript:e) `f` **g** ~~h~~ _i_ __j__ a_b &amp; \x1b[2J"
    for cell in (in_markdown(hostile), code_in_markdown(hostile), code_in_markdown("<b>*i*")):
        page = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
        drawn = page.render(f"| k | v |\n|---|---|\n| {cell} | end |\n")
        assert re.findall(r"<(\w+)", drawn.replace("<br>", "").replace("<code>", "")) == (
            "table thead tr th th tbody tr td td".split()
        )
        assert "\x1b" not in drawn
    assert in_markdown("a_b.json") == "a_b.json"


def preflight(saved, folder, monkeypatch):
    rows = [{"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": f"no{HOSTILE}"}]}] * 2
    (folder / "rows.json").write_text(json.dumps(rows))
    models = ["--model_name_or_path", saved / "student", "--teacher_model_name_or_path", saved / "teacher"]
    out = ["--output_dir", folder / "run", "--preflight", "only", "--report_to", "none", "--max_length", "400"]
    train_gkd.main([str(word) for word in (*models, "--dataset_name", folder / "rows.json", *out)])


def broken_student(folder):
    make_model(0).save_pretrained(folder / "broken")
    make_tokenizer(template=f"{{{{ raise_exception({HOSTILE!r}) }}}}").save_pretrained(folder / "broken")


def converted_samples(saved, folder, monkeypatch):
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": HOSTILE, "completion": HOSTILE}) + "\n")
    convert_data.main([str(folder / "rows.jsonl"), "-o", str(folder / "out.jsonl")])


def conversion_error(saved, folder, monkeypatch):
    (folder / "in").mkdir()
    (folder / f"in/{HOSTILE.replace('/', '')}.jsonl").write_text("{broken\n")
    convert_data.main([str(folder / "in"), "-o", str(folder / "out.jsonl")])


def chat_echo(saved, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"say {HOSTILE}\n"))
    chat.main(["--student", str(saved / "student"), "--temperature", "0", "--max_new_tokens", "8"])


def chat_template_error(saved, folder, monkeypatch):
    broken_student(folder)
    chat.main(["--student", str(folder / "broken")])


def results_table(saved, folder, monkeypatch):
    value = {"value": 0.5, "low": 0.25, "high": 0.75}
    metrics = {"dataset/forward_kl": value, f"score/{HOSTILE.replace('/', '')}": value}
    print_results([{"model": HOSTILE, "metrics": metrics}], f"Held out: {HOSTILE}")


@pytest.mark.parametrize(
    "command",
    [
        preflight,
        converted_samples,
        conversion_error,
        chat_echo,
        chat_template_error,
        results_table,
    ],
)
def test_what_is_shown_does_not_act(saved, tmp_path, monkeypatch, capsys, command):
    said = ""
    try:
        command(saved, tmp_path, monkeypatch)
    except SystemExit as stop:
        said = str(stop.code)
    out, err = capsys.readouterr()
    said += out + err
    assert not ACTS.findall(said.replace("\r", ""))
    assert r"\x1b[2J" in said
    assert command is conversion_error or "[bold]x[/bold]" in "".join(said.split())
