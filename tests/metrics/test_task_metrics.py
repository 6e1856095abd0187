"""Task metrics: each library's values, errors before a model loads, and metrics that raise."""

import json
import sys
from threading import Thread

import pytest
import reasoning_gym
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from gkd.metrics.names import METRICS
from gkd.metrics.tasks import TaskMetrics

ENGLISH = [
    ("The cat sat on the mat today.", "The cat sat on the mat."),
    ("It rains in Spain, they say.", "It rains in Spain and in France."),
    ("A completely different sentence .", "Nothing here is the same at all."),
    ("", "An empty answer to this one."),
]
PACKAGES = {
    "bleu": "sacrebleu",
    "chrf": "sacrebleu",
    "rouge": "rouge_score",
    "math_verify": "math_verify",
    "reasoning_gym": "reasoning_gym",
}
CHINESE = [("今天天气很好,我们去公园。", "今天天气很好,我们去公园玩。"), ("他喜欢喝绿茶。", "她喜欢喝红茶。")]


def score(name: str, completion: str, reference: str | None = None, row: dict | None = None) -> float | None:
    """One metric of one row, which must not raise."""
    metrics = TaskMetrics([name])
    found = metrics.row_scores(0, completion, reference, row or {})
    assert metrics.problems == []
    assert list(found) == [name]
    assert found[name] is None or type(found[name]) is float
    return found[name]


def module(monkeypatch, folder, name: str, text: str) -> None:
    """Writes a module into `folder` and changes to it; both are undone after the test."""
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(folder)])
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_exact_match():
    assert score("exact_match", " 42\n", "42") == 1.0
    assert score("exact_match", "42.", "42") == 0.0


@pytest.mark.parametrize("name", ["exact_match", "rouge", "math_verify"])
@pytest.mark.parametrize("reference", [None, ""])
def test_no_reference_gives_none(name, reference):
    assert score(name, "42", reference) is None


def test_rouge_of_english_is_the_librarys():
    library = RougeScorer(["rougeL"])
    for completion, reference in ENGLISH:
        assert score("rouge", completion, reference) == library.score(reference, completion)["rougeL"].fmeasure


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        ("今天很好", "今天天气很好。", 2 * 4 / (4 + 6)),  # 今天很好 in 今天天气很好
        ("東京タワー", "東京 タワー!", 1.0),
        ("他用 GPU 训练", "他用 gpu_训练", 1.0),
        ("हिन्दी में", "हिन्दी और", 0.5),  # one word of two: vowel signs don't split it
        ("...", "今天", 0.0),
    ],
)
def test_rouge_of_other_scripts(completion, reference, expected):
    assert score("rouge", completion, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        ("So the answer is $\\boxed{\\frac{2}{4}}$.", "0.5", 1.0),
        ("She has 3 + 4 = 7 apples.", "#### 7", 1.0),
        ("It is $x + 2x$.", "$3x$", 1.0),
        ("It is $2x$.", "$3x$", 0.0),
        ("I don't know.", "7", 0.0),
    ],
)
def test_math_verify(completion, reference, expected):
    assert score("math_verify", completion, reference) == expected
    in_thread = []
    thread = Thread(target=lambda: in_thread.append(score("math_verify", completion, reference)))
    thread.start()
    thread.join()
    assert in_thread == [expected]  # signals, and with them the library's timeouts, fail there


def test_math_verify_gives_up_on_a_number_that_fills_the_memory(caplog):
    assert score("math_verify", "$9^{9^{9}}$", "3") == 0.0
    assert caplog.messages == []


def test_reference_without_mathematics_is_a_problem():
    metrics = TaskMetrics(["math_verify"])
    assert metrics.row_scores(4, "cat", "cat", {}) == {"math_verify": None}
    assert metrics.problems[0].startswith("math_verify raised on 1 row, first row 4: ValueError: no mathematics found")


@pytest.mark.parametrize("source", ["chain_sum", "rearc"])
@pytest.mark.parametrize("stored", [dict, json.dumps, lambda metadata: json.loads(json.dumps(metadata))])
def test_reasoning_gym(source, stored):
    entry = reasoning_gym.create_dataset(source, size=1, seed=3)[0]
    row = {**entry, "metadata": stored(entry["metadata"]), "prompt": "..."}
    assert score("reasoning_gym", entry["answer"], None, row) == 1.0
    wrong = score("reasoning_gym", "1 2", None, row)
    assert wrong == reasoning_gym.get_score_answer_fn(source)(answer="1 2", entry=entry) < 0.1
    assert score("reasoning_gym", entry["answer"], None, {"question": "", "answer": ""}) is None
    assert score("reasoning_gym", entry["answer"], None, {**row, "metadata": None}) is None


def test_reasoning_gym_is_quiet_about_an_empty_answer(recwarn):
    entry = reasoning_gym.create_dataset("pool_matrix", size=1, seed=3)[0]
    assert score("reasoning_gym", "", None, entry) == 0.0
    assert [str(w.message) for w in recwarn] == []


def test_corpus_scores_are_sacrebleus_and_quiet(capfd, caplog):
    completions, references = map(list, zip(*ENGLISH * 100, strict=True))  # 100 end in " .": sacrebleu warns
    metrics = TaskMetrics(["bleu", "chrf"])
    found = metrics.corpus_scores(completions, references)
    assert capfd.readouterr() == ("", "")
    assert caplog.messages == []
    assert found == metrics.corpus_scores(completions, references)
    for name, library in (("bleu", BLEU(force=True)), ("chrf", CHRF())):
        result = library.corpus_score(completions, [references], n_bootstrap=1000)
        middle, half = result.format(width=6, score_only=True).split("μ = ")[1].rstrip(")").split(" ± ")
        value, low, high = found[name]
        assert value == result.score
        assert (low, high) == pytest.approx((float(middle) - float(half), float(middle) + float(half)))
        assert 0 < low < value < high < 100


def test_corpus_scores_at_the_ends_of_the_scale():
    metrics = TaskMetrics(["bleu", "chrf", "exact_match"])
    assert metrics.corpus_scores([], []) == {}
    assert metrics.corpus_scores(["", ""], ["some words", "other words"]) == {"bleu": (0,) * 3, "chrf": (0,) * 3}
    same = ["four words stand here", "and here are five words"]
    assert metrics.corpus_scores(same, same)["bleu"] == pytest.approx((100, 100, 100))
    nearly = metrics.corpus_scores([*same, "nothing of it at all"], [*same, "nothing like that was said"])
    assert 0 <= nearly["bleu"][1] < nearly["bleu"][0] < nearly["bleu"][2] == 100


def test_one_row_is_its_own_interval():
    completion, reference = ENGLISH[0]
    found = TaskMetrics(["bleu", "chrf"]).corpus_scores([completion], [reference])
    for name, library in (("bleu", BLEU()), ("chrf", CHRF())):
        assert found[name] == (library.corpus_score([completion], [[reference]]).score,) * 3


def test_bleu_of_chinese_counts_characters():
    completions, references = map(list, zip(*CHINESE, strict=True))
    found = TaskMetrics(["bleu"]).corpus_scores(completions, references)["bleu"]
    assert found[0] == BLEU(tokenize="zh").corpus_score(completions, [references]).score > 40
    assert BLEU().corpus_score(completions, [references]).score < 20  # whole sentences as words
    references = ["Put 显存 and 梯度 into one table.", "She says 梯度 for gradient."]
    completions = ["Put 显卡 and 梯度 into one table.", "He says 梯度 for gradient."]
    found = TaskMetrics(["bleu"]).corpus_scores(completions, references)["bleu"]
    assert found[0] == BLEU().corpus_score(completions, [references]).score
    assert found[0] < BLEU(tokenize="zh").corpus_score(completions, [references]).score


def test_unknown_metric():
    with pytest.raises(ValueError, match="--metrics blue meteor: not known; choose from exact_match bleu chrf"):
        TaskMetrics(["bleu", "blue", "meteor"])


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_missing_package(name, package, monkeypatch):
    class Absent:
        def find_spec(self, module, path=None, target=None):
            if module.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    for loaded in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ValueError, match="^--metrics") as caught:
        TaskMetrics([name])
    message = f"--metrics {name} needs {package}, which is not installed: pip install -e '.[metrics]'."
    assert str(caught.value) == message
    TaskMetrics([other for other in METRICS if PACKAGES.get(other) != package])  # they do without


SOURCES = {
    "string_insertion": ("ABC", {}, "['A', 'B', 'C']", 0.1),
    "binary_matrix": ("0 1\n1 0", {}, "[[0, 1], [1, 0]]", 0.1),
    "n_queens": ("Q _", {"valid_answers": ["Q _"]}, "[['Q', '_']]", 0.5),
    "countdown": ("4*(2+3)", {"numbers": [2, 3, 4], "target": 20}, "(2+3)*4", 1.0),
    "puzzle24": ("1*2*3*4", {"numbers": [1, 2, 3, 4]}, "4*3*2*1", 1.0),
    "simple_integration": ("x**2 + C", {"variable": "x", "integrand": "2*x"}, "x**2 + C", 1.0),
    "intermediate_integration": ("", {"variable": "x", "integrand": "x*exp(x)"}, "x*exp(x) - exp(x) + C", 1.0),
    "polynomial_multiplication": ("x**2 - 1", {}, "-1 + x**2", 1.0),
    "bitwise_arithmetic": ("0x30", {"problem": "((0x1 + 0x2) << 4)"}, "0x30", 1.0),
    "number_sorting": ("['1', '2']", {"direction": "ascending"}, "['1', '2']", None),
}


@pytest.mark.parametrize("source", SOURCES)
def test_an_answer_is_no_code(tmp_path, source):
    """reasoning_gym calls eval on answers, and on some columns of rows; sympy's parser, which it uses too, does so."""
    answer, more, right, value = SOURCES[source]
    metrics, trap = TaskMetrics(["reasoning_gym"]), tmp_path / "ran"
    text = f"__import__('os').mkdir({str(trap)!r})"
    numbers = "+".join(f"chr({ord(letter)})" for letter in text)  # without a quote or an attribute

    def score(completion, answer=answer, **changes):
        row = {"question": "?", "answer": answer, "metadata": {"source_dataset": source} | more | changes}
        return metrics.row_scores(0, completion, None, row)["reasoning_gym"]

    for code in (text, f"eval({numbers})", f"[{text}]", f"sympify({text!r})", f"Add({text!r}, 1)"):
        score(code)
        score(right, answer=code)
        score(right, integrand=code, problem=code)
        assert not trap.exists()
    if value is not None:
        assert score(right) == value
    mathematics = TaskMetrics(["math_verify"])
    assert mathematics.row_scores(0, "$\\frac{1}{2}$", "0.5", {}) == {"math_verify": 1.0}
    mathematics.row_scores(0, text, text, {})
    assert not trap.exists()


def test_scorer_from_the_current_directory(tmp_path, monkeypatch):
    module(
        monkeypatch,
        tmp_path,
        "my_scorers",
        "import numpy as np\n"
        "def short(completion, row):\n"
        "    return len(completion) <= row['limit']\n"
        "def table(completion, row):\n"
        "    return eval(completion)\n",
    )
    short = TaskMetrics(["exact_match"], "my_scorers:short")
    assert short.row_scores(0, "four", "four", {"limit": 4}) == {"exact_match": 1.0, "short": 1.0}
    assert short.row_scores(1, "five!", "four", {"limit": 4}) == {"exact_match": 0.0, "short": 0.0}
    assert type(short.row_scores(0, "four", None, {"limit": 4})["short"]) is float
    table = TaskMetrics([], "my_scorers:table")
    expected = {"0.25": 0.25, "3": 3.0, "None": None, "np.float32(0.5)": 0.5, "np.bool_(True)": 1.0}
    for completion, value in expected.items():
        assert table.row_scores(0, completion, None, {}) == {"table": value}
    assert table.problems == []
    for completion in ("'0.5'", "[1.0]", "float('nan')"):
        assert table.row_scores(5, completion, None, {}) == {"table": None}
    assert table.problems == ["table raised on 3 rows, first row 5: TypeError: returned str, not a number"]


def test_other_metrics_survive_one_that_raises(tmp_path, monkeypatch):
    module(
        monkeypatch,
        tmp_path,
        "strict_scorers",
        "def strict(completion, row):\n"
        "    if row['limit'] is None:\n"
        "        raise LookupError('no limit\\nin this row')\n"
        "    return 0.5\n",
    )
    metrics = TaskMetrics(["exact_match", "reasoning_gym"], "strict_scorers:strict")
    unknown = {"question": "?", "answer": "!", "metadata": {"source_dataset": "no_such"}}
    found = [
        metrics.row_scores(i, "a", "a", row)
        for i, row in enumerate([{"limit": 1}, {"limit": None, **unknown}, {"limit": 2}, {"limit": None}])
    ]
    assert [scores["strict"] for scores in found] == [0.5, None, 0.5, None]
    assert [scores["exact_match"] for scores in found] == [1.0] * 4
    assert [scores["reasoning_gym"] for scores in found] == [None] * 4
    assert metrics.problems == [
        "reasoning_gym raised on 1 row, first row 1: ValueError: Dataset 'no_such' not registered",
        "strict raised on 2 rows, first row 1: LookupError: no limit",
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_module", "must be MODULE:FUNCTION, such as my_scorers:score"),
        ("my_module:", "must be MODULE:FUNCTION"),
        (":score", "must be MODULE:FUNCTION"),
        ("no_such_module:score", "no_such_module can't be imported: ModuleNotFoundError: No module named"),
        ("broken:score", "broken can't be imported: SyntaxError: "),
        ("math:score", "math has no function score."),
        ("math:pi", "math has no function pi."),
        ("good:rouge", "rouge is a metric's name; rename the function."),
    ],
)
def test_scorer_that_cannot_be_used(spec, message, tmp_path, monkeypatch):
    module(monkeypatch, tmp_path, "broken", "def score(:\n")
    module(monkeypatch, tmp_path, "good", "def rouge(completion, row):\n    return 1\n")
    with pytest.raises(ValueError, match=f"^--scorer {spec}: {message}"):
        TaskMetrics([], spec)


def test_chrf_of_answers_that_share_nothing_in_some_resamples():
    """sacrebleu's zero is a Python float, its other scores NumPy's, and statistics.mean refuses the mix."""
    found = TaskMetrics(["chrf"]).corpus_scores(["one", "abc", "xyz"], ["one", "DEF", "GHI"])
    score, low, high = found["chrf"]
    assert 0 <= low <= score <= high <= 100
