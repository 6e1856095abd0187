r"""Distils a teacher into a student with Generalized Knowledge Distillation (arXiv 2306.13649).

Two GPUs, ZeRO-2, half of the steps on the student's own text, the other half on text of the teacher:

    CUDA_VISIBLE_DEVICES=0,1 gkd train --accelerate_config zero2 \
        --model_name_or_path meta-llama/Llama-3.2-1B-Instruct \
        --teacher_model_name_or_path meta-llama/Llama-3.1-8B-Instruct \
        --dataset_name data/prompts_train.json --output_dir runs/mixed --lmbda 0.5 --beta 0.5 --seq_kd True \
        --use_peft --lora_r 8 --lora_alpha 16 --bf16 --gradient_checkpointing --learning_rate 2e-4

Supervised KD on the answers of a dataset, without a launcher:

    gkd train --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \
        --dataset_name data.json --output_dir runs/supervised --lmbda 0 --beta 0

The same with no teacher in memory, from a cache that `gkd cache` wrote:

    gkd train --model_name_or_path STUDENT --teacher_cache caches/answers --lmbda 0 --output_dir runs/cached

`--config FILE.yaml` holds flags too; `--help` shows the ones that matter, `--help_all` every one.
"""

from pathlib import Path

from datasets import Dataset, IterableDataset
from torch.distributed.elastic.multiprocessing.errors import record

from gkd import teachers
from gkd.cli import checks as flag_checks
from gkd.config.parser import GKDParser
from gkd.config.teacher import adopt_student, teacher_flag
from gkd.config.training import DataArguments, GKDArguments
from gkd.config.values import check_room
from gkd.data.loading import check_rows, held_out_source, load_rows, summarize_rows
from gkd.io.errors import one_line_errors, refusals
from gkd.metrics.names import in_order
from gkd.models import loading as models
from gkd.models.lora import lora_config
from gkd.models.pairing import Pairing
from gkd.models.tokenizers import keep_template_kwargs
from gkd.report.tables import print_results, print_summary
from gkd.report.write import write_report
from gkd.runs import resume
from gkd.runs.folder import claim, leave_behind
from gkd.runs.record import write_record
from gkd.runs.results import FOLDER, comparable, read_results
from gkd.runs.typed import resume_command
from gkd.training import preflight
from gkd.training.faults import StopOnSignal
from gkd.training.trainer import GKDTrainer


def main(argv: list[str] | None = None, prog: str = "gkd train") -> None:
    with one_line_errors(prog, lambda: f"Go on with:\n{resume_command()}"):
        train(argv, prog)


def train(argv: list[str] | None, prog: str) -> None:
    parser = GKDParser(prog=prog, description=__doc__)
    data_args, student_args, args = groups = parser.parse(argv)
    required = [(student_args, "model_name_or_path"), (args, teacher_flag(args))]
    if args.teacher_cache is None:  # a cache names it
        required.append((data_args, "dataset_name"))
    for group, name in required:
        if getattr(group, name) is None:
            parser.error(f"--{name} is required.")

    # Bad input is reported here, before a model loads.
    with refusals(prog):
        adopt_student(student_args, args)
        flag_checks.check_flags(data_args, args)
        main_process = args.process_index == 0
        checkpoint = claim(args.output_dir, args.resume_from_checkpoint, main_process, args.preflight != "only")
        teacher = teachers.describe(args)
        teacher.settle(data_args, args, parser.given)
        flag_checks.check_server(args)
        rows = None if teacher.brings_rows else training_rows(data_args, args)
        eval_name, eval_rows = held_out_rows(data_args, args)
        if eval_rows is not None:
            args.eval_on_start = checkpoint is None
        resumed = resume.compare(checkpoint, groups, teacher.fingerprints)
        pairing = Pairing.read(student_args, teacher, args)
        flag_checks.check_student(student_args, args)
        teacher.rehearse()
        if eval_rows is not None:
            check_room(args)
        with args.main_process_first(desc="tokenizing"):  # the other ranks read the first one's cache
            how = data_args.dataset_name, args.dataset_num_proc, teacher.keeps_rows or bool(args.teacher_text_url)
            train_set = teacher.rows(pairing) if rows is None else pairing.encode(rows, *how)
            eval_set = None if eval_rows is None else pairing.encode(eval_rows, eval_name, keep_rows=True)
        survey = flag_checks.check_rows(args, train_set, eval_set, pairing)
        resumed = resumed.check_rows(groups, train_set)
        if args.preflight != "off" and main_process:
            preflight.show(train_set, pairing, student_args, args, teacher.head_size, teacher.coarse, survey)

    if args.preflight == "only":
        return
    if main_process:
        leave_behind(args.output_dir, checkpoint)
        data = {"train": summarize_rows(data_args.dataset_name, train_set)}
        data |= {} if eval_set is None else {"held out": summarize_rows(eval_name, eval_set)}
        write_record(args.output_dir, groups, parser.given, data, args.world_size, resumed)
        if checkpoint is None:  # results of an earlier attempt that left no checkpoint
            Path(args.output_dir, FOLDER, "results.json").unlink(missing_ok=True)
    keep_template_kwargs(pairing.tokenizer, args.chat_template_kwargs)

    with refusals(prog):
        trainer = GKDTrainer(
            model=models.load_student(student_args, args),
            teacher_model=teacher.load(),
            args=args,
            train_dataset=train_set,
            eval_dataset=eval_set,
            processing_class=pairing.tokenizer,
            teacher_processing_class=pairing.teacher_tokenizer,
            peft_config=lora_config(student_args),
            eval_data_name=eval_name,
        )
    with StopOnSignal() as stop:
        trainer.train(resume_from_checkpoint=checkpoint, changed=resumed.changed, stop=stop)
    if trainer.stopped:
        if main_process:
            print(f"Stopped after step {trainer.state.global_step}, which is saved. Go on with:\n{resume_command()}")
        trainer.accelerator.end_training()
        return
    trainer.save_model(args.output_dir)
    out = args.output_dir
    whole = f"The model in {out} is whole: gkd evaluate {out} evaluates it, gkd report {out} writes the report."
    with one_line_errors(prog, whole):
        trainer.save_state()
        if eval_set is not None:
            trainer.evaluate()
            trainer.save_state()  # now with the final evaluation
        if main_process:
            print_outcome(trainer, eval_name)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def print_outcome(trainer: GKDTrainer, eval_name: str) -> None:
    """Prints the results of a finished run, and writes its report."""
    out = trainer.args.output_dir
    print_summary(trainer.state.log_history, out, trainer.args.divergence)
    if trainer.eval_dataset is not None:
        ends = [r for r in comparable(read_results(out), eval_name) if r["model"] in ("before", "after", "teacher")]
        print_results(in_order(ends), f"Held out: {eval_name}, {len(trainer.eval_dataset)} rows")
    print(f"Report: {write_report(out, out)}")
    if trainer.skipped_summary is not None:
        print(trainer.skipped_summary)


def training_rows(data_args: DataArguments, args: GKDArguments) -> Dataset | IterableDataset:
    """The checked rows of --dataset_name. Raises ValueError for a row that can't be used."""
    options = {"config": data_args.dataset_config, "streaming": data_args.dataset_streaming}
    rows = load_rows(data_args.dataset_name, data_args.dataset_train_split, **options)
    check_rows(rows, data_args.dataset_name, needs_answers=args.is_supervised and not args.seq_kd)
    return rows


def held_out_rows(data_args: DataArguments, args: GKDArguments) -> tuple[str, Dataset | None]:
    """The held-out rows' name, and the checked rows, None without evaluation. Raises ValueError as `training_rows`."""
    name, split = held_out_source(data_args.dataset_name, data_args.eval_dataset_name, data_args.dataset_test_split)
    separate = data_args.eval_dataset_name is not None
    if not separate and args.eval_strategy == "no":
        return name, None
    rows = load_rows(name, split, None if separate else data_args.dataset_config)  # never streamed
    check_rows(rows, name, needs_answers=False)
    return name, rows


recorded = record(main)  # torch's launcher then reports why a rank failed
