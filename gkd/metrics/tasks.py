"""Task metrics of completions on held-out rows: whether answers are right, not only close to the teacher's."""

import ast
import functools
import importlib
import json
import logging
import math
import numbers
import os
import statistics
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import regex  # transformers needs it too; `re` knows no scripts

from gkd.io.errors import first_line
from gkd.io.replaced import replaced
from gkd.metrics.names import METRICS

_NEED_REFERENCE = ("exact_match", "rouge", "math_verify")
# Scripts without spaces. Korean has them, so its words are split as English ones are.
_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}"

# Some libraries evaluate an answer as Python. They get only numbers, lists and mathematics, so that it runs no code.
_HARMLESS = (
    *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Name, ast.Call, ast.keyword),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.Load),
)

RowMetric = Callable[[str, str | None, dict], Any]
CorpusMetric = Callable[[list[str], list[str]], tuple[float, float, float]]


def _check(code: str, names: dict[str, Any]) -> None:
    """Raises ValueError unless `code` is literals, operators, and mathematical objects and functions among `names`."""
    from sympy import Basic, cbrt, root, sqrt  # here, since importing it takes a while

    functions = (cbrt, root, sqrt, abs, max, min, pow, round, sum)
    for node in ast.walk(ast.parse(code.strip(), mode="eval")):
        if not isinstance(node, _HARMLESS):
            raise ValueError(f"{type(node).__name__} in an expression")
        if isinstance(node, ast.Name):
            value = names.get(node.id)
            is_class = isinstance(value, type) and issubclass(value, Basic)
            if not (is_class or isinstance(value, Basic | int | float) or any(value is f for f in functions)):
                raise ValueError(f"{node.id} in an expression")


def plain_eval(code: str, *namespaces: Any) -> Any:
    """`eval` for literals and operators; it ignores the namespaces. Raises ValueError for anything else."""
    _check(code, {})
    return eval(code, {"__builtins__": {}})


@contextmanager
def mathematics_alone() -> Iterator[None]:
    """Lets sympy's parser, which evaluates what it has read, refuse anything but mathematics inside the block."""
    from sympy.parsing import sympy_parser  # here, as above

    rewrite = sympy_parser.stringify_expr

    def checked(text: str, local_dict: dict, global_dict: dict, transformations: Any) -> str:
        code = rewrite(text, local_dict, global_dict, transformations)
        _check(code, global_dict | local_dict)
        return code

    with replaced(sympy_parser, "stringify_expr", checked):
        yield


# Each of the following makes a metric's function. Its package comes with an extra, and is imported when it is chosen.
def _exact_match() -> RowMetric:
    return lambda completion, reference, row: completion.strip() == reference.strip()


def _rouge() -> RowMetric:
    from rouge_score.rouge_scorer import RougeScorer

    # The library's own tokenizer drops all but [a-z0-9]. These are lower-case words, each CJK character by itself.
    words = regex.compile(rf"[{_CJK}]|[\w--[_{_CJK}]]+", regex.V1)
    scorer = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=lambda text: words.findall(text.lower())))
    return lambda completion, reference, row: scorer.score(reference, completion)["rougeL"].fmeasure


def _math_verify() -> RowMetric:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at each timeout, and where there is none

    def score(completion: str, reference: str | None, row: dict) -> bool:
        # A completion such as $9^{9^{9}}$ would hang the evaluation. The library's timeouts are signals, which only
        # the main thread receives; elsewhere it refuses to work with them.
        seconds = 5 if threading.current_thread() is threading.main_thread() else None
        with mathematics_alone():
            gold = parse(reference, parsing_timeout=seconds)
            if not gold:
                raise ValueError(
                    "no mathematics found in the reference; LaTeX must stand between $ signs or in \\boxed{}"
                )
            return verify(gold, parse(completion, parsing_timeout=seconds), timeout_seconds=seconds)

    return score


def _reasoning_gym() -> RowMetric:
    import reasoning_gym

    scorer_of = functools.cache(reasoning_gym.get_score_answer_fn)  # some load word lists each time
    for name, module in list(sys.modules.items()):
        if name.startswith("reasoning_gym."):  # some call eval on an answer, some on what a row says
            module.eval = plain_eval

    def score(completion: str, reference: str | None, row: dict) -> float | None:
        metadata = row.get("metadata")
        if metadata is None:
            return None
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
        source = metadata["source_dataset"]
        if source in ("arc_agi", "rearc"):  # they compare tuples, which no file format keeps
            metadata = {**metadata, "output": tuple(map(tuple, metadata["output"]))}
        entry = {"question": row["question"], "answer": row["answer"], "metadata": metadata}
        with warnings.catch_warnings(), mathematics_alone():
            warnings.simplefilter("ignore")  # of numpy, about answers that are no matrix
            try:
                return scorer_of(source)(answer=completion, entry=entry)
            except Exception:  # some scorers can't read prose: a wrong answer, unless the entry itself is broken
                scorer_of(source)(answer=entry["answer"], entry=entry)
                return 0.0

    return score


def _with_interval(metric: Any, completions: list[str], references: list[str]) -> tuple[float, float, float]:
    """The score of a sacrebleu metric and its 95 % interval, from 1000 bootstrap samples with sacrebleu's seed."""
    if len(completions) == 1:
        score = metric.corpus_score(completions, [references]).score
        return score, score, score
    with replaced(statistics, "mean", statistics.fmean):  # mean() refuses chrF's mix of Python's and NumPy's floats
        result = metric.corpus_score(completions, [references], n_bootstrap=1000)
    fields = json.loads(result.format(width=6, signature=metric.get_signature().format(), is_json=True))
    # sacrebleu leaves the interval out if the mean of the samples is 0. It gives half the width of the percentile
    # interval, around the mean: near an end of the scale that reaches beyond it.
    mean, half = fields.get("confidence_mean", 0.0), fields.get("confidence_var", 0.0)
    return result.score, max(mean - half, 0.0), min(mean + half, 100.0)


def _bleu() -> CorpusMetric:
    from sacrebleu.metrics import BLEU

    def score(completions: list[str], references: list[str]) -> tuple[float, float, float]:
        text = "".join(references)
        mostly_cjk = 2 * len(regex.findall(f"[{_CJK}]", text)) > len(regex.findall(r"\S", text))
        # force: don't warn that answers ending in " ." look tokenized
        return _with_interval(BLEU(tokenize="zh" if mostly_cjk else "13a", force=True), completions, references)

    return score


def _chrf() -> CorpusMetric:
    from sacrebleu.metrics import CHRF

    return functools.partial(_with_interval, CHRF())


_ROW_METRICS = {
    "exact_match": _exact_match,
    "rouge": _rouge,
    "math_verify": _math_verify,
    "reasoning_gym": _reasoning_gym,
}
_CORPUS_METRICS = {"bleu": _bleu, "chrf": _chrf}


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _load_scorer(spec: str) -> Callable[[str, dict], Any]:
    """Imports the function that MODULE:FUNCTION names. The current folder is searched after all installed modules.

    The folder of a run is not: somebody else may have sent it.
    """
    module, _, function = spec.partition(":")
    if not module or not function.isidentifier():
        raise ValueError(f"--scorer {spec}: must be MODULE:FUNCTION, such as my_scorers:score.")
    here, hint = os.getcwd(), ""
    if any(map(os.path.lexists, ("run.json", "trainer_state.json", "adapter_config.json"))):
        hint = (
            f". {here} holds a run or an adapter, so no module is taken from it: start from the folder of {module}.py"
        )
    elif here not in sys.path:
        sys.path.append(here)
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # whatever the module does
        raise ValueError(f"--scorer {spec}: {module} can't be imported: {_describe(error)}{hint}") from error
    scorer = getattr(imported, function, None)
    if not callable(scorer):
        raise ValueError(f"--scorer {spec}: {module} has no function {function}.")
    return scorer


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, numbers.Real | np.bool_):
        raise TypeError(f"returned {type(value).__name__}, not a number")
    if not math.isfinite(value):
        raise ValueError(f"returned {value}")
    return float(value)


class TaskMetrics:
    """The metrics that --metrics and --scorer choose; only their packages are imported.

    `scorer` is MODULE:FUNCTION. The function takes a completion and its row and returns a float, a bool or None.

    Raises:
        ValueError: an unknown name, a package that is missing, or a scorer that can't be imported or called.
    """

    def __init__(self, names: list[str], scorer: str | None = None):
        if unknown := [name for name in names if name not in METRICS]:
            raise ValueError(f"--metrics {' '.join(unknown)}: not known; choose from {' '.join(METRICS)}.")
        self._row_metrics: dict[str, RowMetric] = {}
        self._corpus_metrics: dict[str, CorpusMetric] = {}
        self._failures: dict[str, tuple[int, int, str]] = {}  # how many rows, the first one, what it raised
        for name in names:
            try:
                if name in _CORPUS_METRICS:
                    self._corpus_metrics[name] = _CORPUS_METRICS[name]()
                else:
                    self._row_metrics[name] = _ROW_METRICS[name]()
            except ModuleNotFoundError as error:
                raise ValueError(
                    f"--metrics {name} needs {error.name}, which is not installed: pip install -e '.[metrics]'."
                ) from error
        if scorer is not None:
            function = _load_scorer(scorer)
            name = scorer.partition(":")[2]
            if name in METRICS:
                raise ValueError(f"--scorer {scorer}: {name} is a metric's name; rename the function.")
            self._row_metrics[name] = lambda completion, reference, row: function(completion, row)

    @property
    def problems(self) -> list[str]:
        """One line for each metric that raised: on how many rows, and what on the first of them."""
        return [
            f"{name} raised on {count} row{'s' * (count > 1)}, first row {index}: {error}"
            for name, (count, index, error) in self._failures.items()
        ]

    def row_scores(self, index: int, completion: str, reference: str | None, row: dict) -> dict[str, float | None]:
        """Scores of one completion, by metric; None where the row lacks what a metric needs, or where it raised.

        exact_match is 0 or 1, white space around it aside. rouge is the F1 of ROUGE-L, 0 to 1. math_verify is 0 or 1;
        bare numbers are understood, LaTeX only between $ signs or in \\boxed{}, in references too (of a bare `2\\pi`
        it reads the 2). reasoning_gym is 0 to 1, for rows with the `question`, `answer` and `metadata` (an object or
        JSON text) of an entry of that library, and takes the whole completion as the answer.

        `reference` is the dataset's answer, None or empty where it has none; `problems` tells the first `index`.
        """
        scores: dict[str, float | None] = {}
        for name, score in self._row_metrics.items():
            try:
                missing = name in _NEED_REFERENCE and not reference
                scores[name] = None if missing else _number(score(completion, reference, row))
            except Exception as error:  # whatever a library or the scorer does, the evaluation goes on
                scores[name] = None
                count, *first = self._failures.get(name, (0, index, _describe(error)))
                self._failures[name] = (count + 1, *first)
        return scores

    def corpus_scores(self, completions: list[str], references: list[str]) -> dict[str, tuple[float, float, float]]:
        """bleu and chrf where chosen: score and 95 % interval, 0 to 100, {} without rows.

        BLEU splits the text with sacrebleu's `zh` where most characters of the references are Chinese or Japanese,
        else with `13a`. It is 0 where no completion has four tokens, however right.
        """
        if not completions:
            return {}
        return {name: score(completions, references) for name, score in self._corpus_metrics.items()}


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same completion (Welleck et al. 2020, seq-rep-n); 0 if too short."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
