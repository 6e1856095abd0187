"""Evaluates students against their teacher on held-out rows: divergences, the students' own text, task metrics.

A run of train_gkd.py, which knows its models and data: the student before and after, and the teacher:

    python eval_gkd.py runs/mixed --dataset_name data/prompts_heldout.json

All checkpoints of a run, as a curve over its steps, on two GPUs:

    accelerate launch --num_processes 2 eval_gkd.py runs/mixed --checkpoints --metrics exact_match chrf

Any models, folders (whole, or LoRA adapters) or hub ids, with a metric of your own:

    python eval_gkd.py --models student-a student-b --teacher_model_name_or_path TEACHER \
        --dataset_name rows.json --output_dir evaluations/ab --scorer my_scorers:score

Flags that are not given are the run's, else train_gkd.py's defaults. Rows that are done are kept: a killed evaluation
goes on where it was. Results go to OUTPUT_DIR/evaluation and OUTPUT_DIR/report.html.
"""

import gc
import sys

from accelerate import Accelerator

from gkd import flag_checks
from gkd.arguments import parse_flags
from gkd.candidates import Models, entries
from gkd.collator import RowEncoder, encode_dataset
from gkd.data import check_rows, held_out_source, load_rows
from gkd.eval_arguments import EvalArguments
from gkd.evaluation import Evaluation, terms
from gkd.fallback import one_line
from gkd.models import load_teacher
from gkd.report import write_report
from gkd.results import comparable, in_order, print_results, read_results


def parse(argv: list[str]) -> EvalArguments:
    """Exits with code 2 and one line for an unknown flag or a bad value."""
    if argv and not argv[0].startswith("-"):
        argv = ["--run", *argv]
    return parse_flags(EvalArguments, "eval_gkd.py", __doc__.split("\n")[0], argv, usage="%(prog)s [RUN] [flags]")


def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    # Everything that can be wrong with the input is told here, before a model loads.
    try:
        flag_checks.outside_of_data(args.output_dir, args.dataset_name)
        name, split = held_out_source(args.dataset_name, args.dataset_name, args.dataset_test_split)
        rows = load_rows(name, split, args.dataset_config)
        rows = rows.select(range(min(args.max_rows or len(rows), len(rows))))
        check_rows(rows, name, needs_answers=False)
        students = entries(args)
        models = Models(args, students)
        flag_checks.check_teacher(args)
        for entry in students:
            models.rehearse(entry)
        encoder = RowEncoder.of(args, models.tokenizer, models.stop_ids)
        accelerator = Accelerator()
        with accelerator.main_process_first():
            encoded = encode_dataset(rows, encoder, keep_rows=True)
    except (ValueError, OSError) as error:
        sys.exit(f"eval_gkd.py: {one_line(error)}")

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
        args.beta,
        args.output_dir,
        lambda: models.generator.capture_seconds,
        seed=args.seed,
    )
    teacher = load_teacher(args)
    if not getattr(teacher, "is_quantized", False):
        teacher.to(accelerator.device)
    evaluation.teacher(models.candidate(accelerator, "teacher", teacher, min(models.sizes.values()), None))
    for entry in students:
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
