r"""Evaluates students against their teacher on held-out rows: divergences, the students' own text, task metrics.

A run of `gkd train`, which knows its models and data: the student before and after, and the teacher:

    gkd evaluate runs/mixed --dataset_name data/prompts_heldout.json

All checkpoints of a run, as a curve over its steps, on two GPUs:

    gkd evaluate runs/mixed --accelerate_config ddp --num_processes 2 --checkpoints --metrics exact_match chrf

Any models, folders (whole, or LoRA adapters) or hub ids, with a metric of your own:

    gkd evaluate --models student-a student-b --teacher_model_name_or_path TEACHER \
        --dataset_name rows.json --output_dir evaluations/ab --scorer my_scorers:score

Flags that are not given come from the run (except --scorer), else from the defaults of `gkd train`. Finished rows are
kept: the same command continues an interrupted evaluation. Results go to OUTPUT_DIR/evaluation and OUTPUT_DIR/report.html.
"""

import gc
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from accelerate import Accelerator

from gkd.cli import checks as flag_checks
from gkd.config.evaluation import EvalArguments, make_parser
from gkd.data.loading import check_rows, held_out_source, load_rows
from gkd.evaluation.candidates import Models, entries
from gkd.evaluation.evaluator import Candidate, Evaluation, terms
from gkd.io.errors import one_line_errors, refusals
from gkd.io.files import refuse_links
from gkd.io.terminal import visible
from gkd.losses.objective import divergence_of
from gkd.metrics.names import in_order
from gkd.report.tables import print_results
from gkd.report.write import write_report
from gkd.runs.results import comparable, read_results


def parse(argv: list[str], prog: str = "gkd evaluate") -> EvalArguments:
    """Exits with code 2 and one line for an unknown flag or a bad value."""
    return make_parser(prog=prog, description=__doc__).parse_one(argv, ("--run",))


def main(argv: list[str] | None = None, prog: str = "gkd evaluate") -> None:
    with one_line_errors(prog, "Rows that are done are kept: the same command goes on."):
        _evaluate(parse(sys.argv[1:] if argv is None else argv, prog), prog)


def evaluate(models: str | os.PathLike | Sequence[str | os.PathLike], **options) -> list[dict[str, Any]]:
    """Evaluates a run, or several models, against the teacher, as `gkd evaluate` does.

    Args:
        models: the folder of a run, or a list of models. A list needs `teacher_model_name_or_path`, `dataset_name` and
            `output_dir`.
        options: the other flags of `gkd evaluate` (`gkd.config.evaluation.EvalArguments`).

    Returns:
        The results on these rows, as in `OUTPUT_DIR/evaluation/results.json`; an empty list on all but the main process.

    Raises:
        ValueError: a flag, a model or a row can't be used; before any weights load.
    """
    if isinstance(models, str | os.PathLike):
        return _evaluate(EvalArguments(run=os.fspath(models), **options))
    return _evaluate(EvalArguments(models=[os.fspath(model) for model in models], **options))


def _evaluate(args: EvalArguments, prog: str | None = None) -> list[dict[str, Any]]:
    """Evaluates. `prog`: the command, which prints results and one-line errors; None for a call from Python."""
    refusing = nullcontext if prog is None else partial(refusals, prog)
    if args.left_out and os.environ.get("RANK", "0") == "0":
        print(
            f"warning: {visible(args.run)}: its record brings no code and no such way of loading; left out: "
            f"{', '.join(args.left_out)}. Type them again to have them.",
            file=sys.stderr,
        )
    models, evaluation, _ = begin(args, refusing)
    accelerator, name = evaluation.accelerator, evaluation.data
    for entry in models.students:
        with refusing():
            candidate = models.student(entry, accelerator)
        evaluation.student(candidate)
        del candidate
        gc.collect()  # before the next one loads
    results = []
    if accelerator.is_main_process:
        results = in_order(comparable(read_results(args.output_dir), name))
        if prog is not None:
            print_results(results, f"Held out: {name}, {len(evaluation.rows)} rows")
        report = write_report(args.output_dir, args.output_dir)
        if prog is not None:
            print(f"Report: {report}")
    accelerator.end_training()
    return results


def begin(args: EvalArguments, refusing: Callable[[], AbstractContextManager]) -> tuple[Models, Evaluation, Candidate]:
    """Checks the input before a model loads, then has the teacher write its answers. The last result is the teacher.

    `refusing()`: a context that says in one line what can't be used.
    """
    with refusing():
        flag_checks.outside_of_data(args.output_dir, args.dataset_name)
        name, split = held_out_source(args.dataset_name, args.dataset_name, args.dataset_test_split)
        rows = load_rows(name, split, args.dataset_config)
        rows = rows.select(range(min(args.max_rows or len(rows), len(rows))))
        check_rows(rows, name, needs_answers=False)
        refuse_links(args.output_dir)
        models = Models(args, entries(args))
        models.rehearse()
        pairing = models.pairing
        accelerator = Accelerator()
        with accelerator.main_process_first():
            encoded = pairing.encode(rows, source=name, keep_rows=True)

    with refusing():
        teacher, candidate = models.teacher(accelerator)
    evaluation = Evaluation(
        accelerator,
        pairing.tokenizer,
        encoded,
        name,
        terms(args, args.teacher_model_name_or_path or teacher.name),
        pairing.stop_ids,
        args.metrics,
        args.scorer,
        args.per_device_eval_batch_size,
        divergence_of(args),
        args.output_dir,
        lambda: models.generator.capture_seconds,
        teacher,
        seed=args.seed,
    )
    evaluation.teacher(candidate)
    return models, evaluation, candidate
