r"""Evaluates students against their teacher on held-out rows: divergences, the students' own text, task metrics.

A run of train_gkd.py, which knows its models and data: the student before and after, and the teacher:

    python eval_gkd.py runs/mixed --dataset_name data/prompts_heldout.json

All checkpoints of a run, as a curve over its steps, on two GPUs:

    accelerate launch --num_processes 2 eval_gkd.py runs/mixed --checkpoints --metrics exact_match chrf

Any models, folders (whole, or LoRA adapters) or hub ids, with a metric of your own:

    python eval_gkd.py --models student-a student-b --teacher_model_name_or_path TEACHER \
        --dataset_name rows.json --output_dir evaluations/ab --scorer my_scorers:score

Flags that are not given are the run's (but --scorer never is), else train_gkd.py's defaults. Rows that are done are
kept: a killed evaluation goes on where it was. Results go to OUTPUT_DIR/evaluation and OUTPUT_DIR/report.html.
"""

import gc
import os
import sys

from gkd.cli.start import answer

if __name__ == "__main__":  # help and wrong flags are answered before the imports below, which take seconds
    answer("eval_gkd.py", __doc__)

from accelerate import Accelerator

from gkd.cli import checks as flag_checks
from gkd.config.evaluation import EvalArguments, make_parser
from gkd.data.encoding import RowEncoder, encode_dataset
from gkd.data.loading import check_rows, held_out_source, load_rows
from gkd.evaluation.candidates import Models, entries
from gkd.evaluation.evaluator import Evaluation, terms
from gkd.io.errors import one_line_errors, refusals
from gkd.io.links import refuse_links
from gkd.io.terminal import visible
from gkd.losses.objective import divergence_of
from gkd.metrics.names import in_order
from gkd.models.loading import load_teacher
from gkd.report import write_report
from gkd.report.tables import print_results
from gkd.runs.results import comparable, read_results


def parse(argv: list[str]) -> EvalArguments:
    """Exits with code 2 and one line for an unknown flag or a bad value."""
    if argv and not argv[0].startswith("-"):
        argv = ["--run", *argv]
    return make_parser(description=__doc__).parse_one(argv)


@one_line_errors("eval_gkd.py", "Rows that are done are kept: the same command goes on.")
def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.left_out and os.environ.get("RANK", "0") == "0":
        print(
            f"warning: {visible(args.run)}: its record brings no code and no such way of loading; left out: "
            f"{', '.join(args.left_out)}. Type them again to have them.",
            file=sys.stderr,
        )
    # Everything that can be wrong with the input is told here, before a model loads.
    with refusals("eval_gkd.py"):
        flag_checks.outside_of_data(args.output_dir, args.dataset_name)
        name, split = held_out_source(args.dataset_name, args.dataset_name, args.dataset_test_split)
        rows = load_rows(name, split, args.dataset_config)
        rows = rows.select(range(min(args.max_rows or len(rows), len(rows))))
        check_rows(rows, name, needs_answers=False)
        refuse_links(args.output_dir)
        students = entries(args)
        models = Models(args, students)
        flag_checks.check_teacher(args)
        for entry in students:
            models.rehearse(entry)
        encoder = RowEncoder.of(args, models.tokenizer, models.stop_ids)
        accelerator = Accelerator()
        with accelerator.main_process_first():
            encoded = encode_dataset(rows, encoder, keep_rows=True, source=name)

    evaluation = Evaluation(
        accelerator,
        models.tokenizer,
        encoded,
        name,
        terms(args, args.teacher_model_name_or_path),
        models.stop_ids,
        args.metrics,
        args.scorer,
        args.per_device_eval_batch_size,
        divergence_of(args),
        args.output_dir,
        lambda: models.generator.capture_seconds,
        seed=args.seed,
    )
    with refusals("eval_gkd.py"):
        teacher = load_teacher(args)
    if not getattr(teacher, "is_quantized", False):
        teacher.to(accelerator.device)
    evaluation.teacher(models.candidate(accelerator, "teacher", teacher, min(models.sizes.values()), None))
    for entry in students:
        with refusals("eval_gkd.py"):
            student = models.student(entry, accelerator.device)
        shared = models.sizes[entry.path]
        candidate = models.candidate(
            accelerator, entry.label, student, shared, teacher, step=entry.step, path=entry.path
        )
        evaluation.student(candidate)
        del student, candidate
        gc.collect()  # before the next one loads
    if accelerator.is_main_process:
        print_results(
            in_order(comparable(read_results(args.output_dir), name)), f"Held out: {name}, {len(encoded)} rows"
        )
        print(f"Report: {write_report(args.output_dir, args.output_dir)}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
