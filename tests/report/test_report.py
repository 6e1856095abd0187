"""The report of one run and of two: complete, self-contained, and true to the runs' records."""

import json
import re
import shutil

import pytest
from commands import HELD_OUT, flags
from markdown_it import MarkdownIt
from tiny import ROWS

import eval_gkd
import train_gkd
from gkd.cli import report
from gkd.metrics.names import more_is_better, text_of
from gkd.report.tables import print_results
from gkd.report.verdict import headline, text_quality, verdict
from gkd.report.write import speeds, write_report
from gkd.runs.results import read_results


@pytest.fixture(scope="module")
def runs(saved, tmp_path_factory):
    """Two runs from one student, λ = 0 and λ = 1, whose data holds what HTML and Markdown must not read."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "train.json").write_text(json.dumps(ROWS))
    wicked = [{"prompt": [{"role": "user", "content": f"{'~' * 8}\n<script>alert(1)</script> [x](http://x) a | b"}]}]
    (folder / "held_out.json").write_text(json.dumps([*wicked, *HELD_OUT]))
    for lmbda in (0, 1):
        more = ("--lmbda", lmbda, "--eval_strategy", "steps", "--eval_steps", 1, "--metrics", "exact_match")
        train_gkd.main(flags(saved, folder, folder / f"lambda_{lmbda}", *more, "--max_steps", 3))
    return folder


def pages(folder):
    return [(folder / name).read_text(encoding="utf-8") for name in ("report.md", "report.html")]


def test_report_of_a_run(runs):
    folder = runs / "lambda_1"
    for page in pages(folder):
        for part in ("Evaluation", "Over the steps", "Training", "Answers", "Configuration", "Use it"):
            assert part in page
        assert "gkd export " in page
    markdown, html = pages(folder)
    results = {r["model"]: r["metrics"] for r in read_results(folder)}
    for model in ("before", "after"):
        assert text_of("x/forward_kl", results[model]["dataset/forward_kl"]) in markdown
    assert results["after"]["on_policy/completion_length"]["value"] > 0
    for link in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (folder / link).read_text(encoding="utf-8").startswith("<?xml")
    shown = {x.split('"')[0] for x in html.split(' alt="')[1:]}
    assert {"Loss", "Speed", "Learning rate", "Forward KL, on the data&#39;s answers"} <= shown


def test_html_needs_no_other_file_and_text_stays_text(runs):
    markdown, html = pages(runs / "lambda_1")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", html)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "~~~~text\n<|user|>" not in markdown  # special tokens are left out
    assert '<meta name="viewport"' in html
    assert "@media print" in html


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_figures_that_are_not_finite_are_left_out_of_pictures(runs, tmp_path, value):
    """Values of a model whose weights are NaN, or whose perplexity overflows."""
    folder = tmp_path / "run"
    shutil.copytree(runs / "lambda_1", folder)
    shutil.rmtree(folder / "report_figures")
    results = read_results(folder)
    broken = dict.fromkeys(("value", "low", "high"), value)
    for result in results:
        for name in result["metrics"]:
            if name.startswith("dataset/") or result["model"] == "before":
                result["metrics"][name] = broken
    (folder / "evaluation/results.json").write_text(json.dumps({"results": results}))
    write_report(folder, folder)
    shown = {x.split('"')[0] for x in pages(folder)[1].split(' alt="')[1:]}
    assert "Forward KL, on its own text" in shown
    assert "Forward KL, on the data&#39;s answers" not in shown
    assert str(value) in pages(folder)[0]  # tables tell it


def test_nothing_from_outside_becomes_html_or_a_link(runs, tmp_path):
    """Prompts, answers, names of data and models, and values of run.json are shown literally to a reader of the Markdown."""
    wicked = "<img src=x onerror=alert(2)> [a](http://x) `` ~~~ | \n# b"
    folder = tmp_path / "run"
    shutil.copytree(runs / "lambda_1", folder)
    record = json.loads((folder / "run.json").read_text())
    record["arguments"]["model_name_or_path"] = wicked
    record["arguments"][wicked], record["changed"] = 1, [*record["changed"], wicked]
    record["data"] = {wicked: {"name": wicked, wicked: [wicked]}}
    record["versions"] = {wicked: wicked}
    (folder / "run.json").write_text(json.dumps(record))
    results = json.loads((folder / "evaluation/results.json").read_text())
    for entry in results["results"]:
        entry["data"] = wicked
    (folder / "evaluation/results.json").write_text(json.dumps(results))
    write_report(folder, folder)
    markdown, html = pages(folder)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(markdown)
    tokens += [child for token in tokens for child in token.children or []]
    kinds = {token.type for token in tokens}
    assert not kinds & {"html_block", "html_inline", "link_open"}
    assert all(token.attrs["src"].startswith("report_figures/") for token in tokens if token.type == "image")
    assert {"fence", "image", "table_open"} <= kinds
    assert any("<script>alert(1)" in token.content for token in tokens if token.type == "fence")
    assert "<img src=x" not in html


def test_configuration_reads_as_typed(runs):
    markdown, _ = pages(runs / "lambda_1")
    assert "| `--metrics` | exact_match |" in markdown
    assert "| `--max_steps` | 3 |" in markdown
    assert "num_train_epochs" not in markdown  # --max_steps ruled
    assert "{'" not in markdown
    assert re.search(r"prompt tokens \{\"median\": \d+, \"longest\": \d+\}", markdown)


def result(model, change=None, **shares):
    names = {"kl": "dataset/forward_kl", "repetition": "on_policy/repetition", "truncated": "on_policy/truncated"}

    def estimates(values, spread):
        return {names[n]: {"value": v, "low": v - spread, "high": v + spread} for n, v in values.items()}

    return {"model": model, "metrics": estimates(shares, 0.02), "change": estimates(change or {}, 0.05)}


@pytest.mark.parametrize(
    ("before", "after", "mark", "first"),
    [
        (
            {"kl": 9.0, "repetition": 0.22, "truncated": 1.0},
            {"kl": 3.0, "repetition": 0.70, "truncated": 1.0},
            "worse",
            "Worse or bad: the quality of its own text (repeated 4-grams 22.0% → 70.0%, cut off by the limit 100.0% → "
            "100.0%); better: forward KL, on the data's answers (9 → 3).",
        ),
        (
            {"kl": 3.0, "repetition": 0.3, "truncated": 0.5},
            {"kl": 3.01, "repetition": 0.05, "truncated": 0.04},
            "better",
            "Better: the quality of its own text (repeated 4-grams 30.0% → 5.0%, cut off by the limit 50.0% → 4.0%); "
            "no clear change: forward KL, on the data's answers.",
        ),
        (
            {"kl": 3.0, "repetition": 0.05, "truncated": 0.04},
            {"kl": 2.0, "repetition": 0.06, "truncated": 0.05},
            "unclear",
            "Better: forward KL, on the data's answers (3 → 2); no clear change: the quality of its own text.",
        ),
    ],
)
def test_the_first_sentence_is_honest_and_bad_text_is_red(before, after, mark, first):
    change = {name: after[name] - before[name] for name in before}
    start, end = result("before", **before), result("after", change, **after)
    teacher = result("teacher", repetition=0.04, truncated=0.03)
    (quality,) = text_quality(start, end, teacher)
    assert quality.mark == mark
    assert quality.teacher == "repeated 4-grams 4.0%, cut off by the limit 3.0%"
    assert verdict(True, [headline("dataset/forward_kl", start, end, None), quality], True) == first


@pytest.mark.parametrize(
    ("before", "after", "goal", "mark"),
    [
        (0.01, 0.08, 0.088, "unclear"),  # a student that repeats no more than its teacher
        (0.30, 0.10, 0.088, "better"),
        (0.01, 0.08, None, "worse"),
        (0.08, 0.20, 0.088, "worse"),
        (0.09, 0.01, 0.088, "unclear"),  # less than the teacher is no gain
        (0.05, 0.10, 0.088, "unclear"),  # within the change's interval
        (0.80, 0.60, 0.088, "worse"),  # nearer, and still far
    ],
)
def test_text_that_repeats_as_much_as_the_teachers_is_good(before, after, goal, mark):
    start, end = result("before", repetition=before), result("after", {"repetition": after - before}, repetition=after)
    teacher = None if goal is None else result("teacher", repetition=goal)
    (quality,) = text_quality(start, end, teacher)
    assert quality.mark == mark
    change = quality.lines[0][1]
    assert ("nearer to the teacher's" in change) == (goal is not None and (mark == "better" or before == 0.80))


def test_the_first_line_of_a_page_is_the_verdict(runs):
    markdown, html = pages(runs / "lambda_1")
    line = markdown.splitlines()[2]
    assert re.match("(Worse or bad|Better|No clear change): ", line)
    assert "the quality of its own text" in line
    assert html.index('class="verdict"') < html.index('class="card ')


def test_equal_models_show_one_speed():
    sizes = [(874.0, 10), (346.0, 10), (50.0, 20)]
    columns = [{"tokens_per_second": speed, "parameters": parameters, "gib": 1.0} for speed, parameters in sizes]
    assert speeds(columns) == ["346 to 874", "346 to 874", "50"]


def test_two_runs_side_by_side(runs, tmp_path):
    report.main([str(runs / "lambda_0"), str(runs / "lambda_1"), "-o", str(tmp_path)])
    markdown, html = pages(tmp_path)
    header = next(line for line in markdown.splitlines() if line.startswith("| |"))
    # The student before is one and the same, so it has one column.
    assert header == "| | lambda_0: before = lambda_1: before | lambda_0: after | lambda_1: after | teacher |"
    assert "| `--lmbda` | 0.0 | 1.0 |" in markdown
    for page in (markdown, html):
        assert "Answers of lambda_0" in page
    curve = (tmp_path / "report_figures/curves_0_forward_kl__on_the_data_s_answers.svg").read_text(encoding="utf-8")
    for label in ("lambda_0", "lambda_1"):
        assert label in curve


def test_reports_of_what_is_not_finished(runs, tmp_path):
    """A run without evaluation, one that was cut off, and an evaluation without a run."""
    folder = tmp_path / "cut"
    shutil.copytree(runs / "lambda_0", folder, ignore=shutil.ignore_patterns("evaluation", "report*", "checkpoint-*"))
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "checkpoint-2").mkdir()
    (folder / "trainer_state.json").unlink()
    state |= {"global_step": 2, "log_history": [log for log in state["log_history"] if log["step"] <= 2]}
    (folder / "checkpoint-2/trainer_state.json").write_text(json.dumps(state))
    write_report(folder, folder)
    for page in pages(folder):
        assert "2 of 3: not finished" in page
        assert "Not finished. Whether the student got better is not known: it was not evaluated" in page
        assert "gkd evaluate " in page
    evaluated = tmp_path / "evaluated"
    shutil.copytree(runs / "lambda_0/evaluation", evaluated / "evaluation")
    write_report(evaluated, evaluated)
    assert "Evaluation" in pages(evaluated)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere"], "nowhere: no such folder"),
        (["{tmp}"], "neither trainer_state.json, nor a checkpoint, nor evaluation/results.json"),
        (["{tmp}", "{tmp}"], "say where their report goes, by -o DIR"),
    ],
)
def test_bad_input(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        report.main([word.format(tmp=tmp_path) for word in arguments])
    assert stop.value.code != 0
    assert message in f"{stop.value} {capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())


def test_a_record_from_elsewhere_is_reported(runs, tmp_path):
    run = shutil.copytree(runs / "lambda_0", tmp_path / "run")
    theirs = {"arguments": {"max_steps": [1]}, "hardware": [], "data": [1], "versions": ["x"], "changed": None}
    for record in (theirs, theirs | {"hardware": {"ranks": []}, "data": {"train": [1]}, "changed": [{}, 1]}):
        (run / "run.json").write_text(json.dumps(record))
        report.main([str(run)])
        assert "Evaluation" in pages(run)[0]


def test_a_state_from_elsewhere_is_refused(runs, tmp_path):
    run = shutil.copytree(runs / "lambda_0", tmp_path / "run")
    for text, said in (("[]", "it is no object"), ("[" * 100_000, "maximum recursion depth exceeded")):
        (run / "trainer_state.json").write_text(text)
        with pytest.raises(SystemExit) as stop:
            report.main([str(run)])
        assert f"trainer_state.json is damaged: {said}" in str(stop.value)


def test_numbers_as_text():
    assert text_of("on_policy/truncated", {"value": 0.25, "low": 0.2, "high": 0.3}) == "25.0% [20.0%, 30.0%]"
    assert text_of("x/forward_kl", {"value": -0.5, "low": -0.61234, "high": 0.1}, sign=True) == "-0.5 [-0.612, +0.1]"
    assert text_of("x/teacher_perplexity", {"value": 1234.5, "low": 999, "high": 1e6}) == "1,234 [999, 1,000,000]"
    assert not more_is_better("eval_math_loss")
    better = {
        n: more_is_better(n)
        for n in ("eval_loss", "eval_on_policy/reverse_kl", "eval_dataset/agreement", "eval_score/chrf")
    }
    assert better == {
        "eval_loss": False,
        "eval_on_policy/reverse_kl": False,
        "eval_dataset/agreement": True,
        "eval_score/chrf": True,
    }


def test_another_set_of_rows_and_another_model_get_a_place(saved, runs, tmp_path):
    """What eval_gkd.py adds to a run stands beside what training found, never in its place."""
    folder = tmp_path / "run"
    shutil.copytree(runs / "lambda_0", folder)
    (tmp_path / "other.json").write_text(json.dumps(ROWS[:2]))
    eval_gkd.main([str(folder), "--dataset_name", str(tmp_path / "other.json"), "--models", str(saved / "student")])
    markdown, _ = pages(folder)
    first, second = markdown.split("## Evaluation on ")[1:]
    assert first.startswith(str(runs / "held_out.json"))
    assert second.startswith(str(tmp_path / "other.json"))
    assert "| | before | after | teacher |" in first
    assert "Over the steps" in first
    assert "| | before = student | after | teacher |" in second  # the student is the run's own, before it trained
    assert "Over the steps" not in second


def test_a_table_in_a_log_is_whole(capsys):
    estimate = {"value": 1234567.0, "low": 1000000.0, "high": 2000000.0}
    metrics = {"metrics": {"dataset/student_perplexity": estimate}}
    change = {"change": {"dataset/student_perplexity": estimate}}
    print_results([{"model": m, **metrics, **change} for m in ("before", "after", "teacher")], "Held out")
    assert "teacher ┃" in capsys.readouterr().out


def test_a_run_of_cross_entropy_alone_is_called_so(runs, saved, tmp_path, monkeypatch):
    units = {}
    monkeypatch.setattr("gkd.report.curves._lines", lambda title, unit, *_: units.update({title: unit}) or {})
    sft = flags(
        saved,
        runs,
        tmp_path / "sft",
        "--lmbda",
        0,
        "--kd_ratio",
        0,
        "--eval_strategy",
        "no",
        "--eval_on_start",
        "False",
    )
    train_gkd.main(sft)
    assert units["Loss"] == "cross-entropy, nats per token"
    report_of_it = (tmp_path / "sft/report.md").read_text(encoding="utf-8")
    assert "| `--kd_ratio` | 0" in report_of_it
    assert "| `--beta` |" not in report_of_it
    write_report([runs / "lambda_0"], tmp_path)
    assert units["Loss"] != "cross-entropy, nats per token"
