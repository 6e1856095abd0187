r"""Distils a teacher into a student with Generalized Knowledge Distillation (arXiv 2306.13649).

Two GPUs, ZeRO-2, half of the steps on the student's own text, the other half on text of the teacher:

    CUDA_VISIBLE_DEVICES=0,1 accelerate launch --config_file ds_configs/zero2.yaml --num_processes 2 train_gkd.py \
        --model_name_or_path meta-llama/Llama-3.2-1B-Instruct \
        --teacher_model_name_or_path meta-llama/Llama-3.1-8B-Instruct \
        --dataset_name data/prompts_train.json --output_dir runs/mixed --lmbda 0.5 --beta 0.5 --seq_kd True \
        --use_peft --lora_r 8 --lora_alpha 16 --bf16 --gradient_checkpointing --learning_rate 2e-4

Supervised KD on the answers of a dataset, without a launcher:

    python train_gkd.py --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \
        --dataset_name data.json --output_dir runs/supervised --lmbda 0 --beta 0

The same with no teacher in memory, which cache_teacher.py has asked before:

    python train_gkd.py --model_name_or_path STUDENT --teacher_cache caches/answers --lmbda 0 --output_dir runs/cached

`--config FILE.yaml` holds flags too; `--help` shows the ones that matter, `--help_all` every one.
"""

from pathlib import Path

from gkd.cli.start import answer

if __name__ == "__main__":  # help and wrong flags are answered before the imports below, which take seconds
    answer("train_gkd.py", __doc__)

from torch.distributed.elastic.multiprocessing.errors import record

from gkd.cli import checks as flag_checks
from gkd.config.parser import GKDParser
from gkd.config.teacher import adopt_student
from gkd.config.values import check_room
from gkd.data.encoding import RowEncoder, encode_dataset
from gkd.data.loading import check_rows, held_out_source, load_rows, summarize_rows
from gkd.io.errors import one_line_errors, refusals
from gkd.metrics.names import in_order
from gkd.models import loading as models
from gkd.models.lora import lora_config
from gkd.models.tokenizers import keep_template_kwargs, load_tokenizers, shared_vocab_size, stop_token_ids
from gkd.report import write_report
from gkd.report.tables import print_results, print_summary
from gkd.runs import resume
from gkd.runs.folder import claim, leave_behind
from gkd.runs.record import write_record
from gkd.runs.results import FOLDER, comparable, read_results
from gkd.runs.resume import resume_command
from gkd.teachers.cache import TeacherCache
from gkd.training import preflight
from gkd.training.faults import StopOnSignal
from gkd.training.trainer import GKDTrainer


@one_line_errors("train_gkd.py", lambda: f"Go on with:\n{resume_command()}")
def main(argv: list[str] | None = None) -> None:
    parser = GKDParser(description=__doc__)
    data_args, student_args, args = parser.parse(argv)
    required = {"--model_name_or_path": student_args.model_name_or_path}
    if args.teacher_cache is None:  # which knows both
        required["--teacher_model_name_or_path"] = args.teacher_model_name_or_path
        required["--dataset_name"] = data_args.dataset_name
    for flag, value in required.items():
        if value is None:
            parser.error(f"{flag} is required.")

    # Everything that can be wrong with the input is told here, before a model loads.
    with refusals("train_gkd.py"):
        adopt_student(student_args, args)
        flag_checks.check_flags(data_args, args)
        main_process = args.process_index == 0
        checkpoint = claim(args.output_dir, args.resume_from_checkpoint, main_process, args.preflight != "only")
        cache = None
        if args.teacher_cache is not None:
            cache = TeacherCache(args.teacher_cache, verify=args.local_process_index == 0)
            cache.settle(data_args, args, parser.given)
        else:
            needs_answers = args.lmbda < 1 and not args.seq_kd
            options = {"config": data_args.dataset_config, "streaming": data_args.dataset_streaming}
            train_rows = load_rows(data_args.dataset_name, data_args.dataset_train_split, **options)
            check_rows(train_rows, data_args.dataset_name, needs_answers)
        eval_rows = None
        eval_name, split = held_out_source(
            data_args.dataset_name, data_args.eval_dataset_name, data_args.dataset_test_split
        )
        if data_args.eval_dataset_name is not None or args.eval_strategy != "no":
            own = data_args.eval_dataset_name is not None
            eval_rows = load_rows(eval_name, split, None if own else data_args.dataset_config)  # whole, never a stream
            check_rows(eval_rows, eval_name, needs_answers=False)
            args.eval_on_start = checkpoint is None

        resumed = resume.compare(checkpoint, (data_args, student_args, args))
        tokenizer, teacher_tokenizer = load_tokenizers(student_args, args, with_teacher=cache is None)
        configs = models.load_configs(student_args, args, with_teacher=cache is None)
        models.keep_within_window(args, [config for config, _ in configs])
        flag_checks.check_models(student_args, args, with_teacher=cache is None)
        if eval_rows is not None:
            check_room(args)
        sizes = [config.get_text_config().vocab_size for config, _ in configs]
        if cache is None:
            shared_vocab_size(tokenizer, teacher_tokenizer, *sizes)
        else:
            cache.check(tokenizer, *sizes, args)
            teacher_tokenizer = tokenizer  # the same, so the check says
        stop_ids = stop_token_ids(tokenizer, cache, *(config for pair in configs for config in pair))
        encoder = RowEncoder.of(args, tokenizer, stop_ids)
        with args.main_process_first(desc="tokenizing"):  # the other ranks read what the first one cached
            if cache is not None:
                train_set = cache.rows()
            else:
                name = data_args.dataset_name
                train_set = encode_dataset(train_rows, encoder, args.dataset_num_proc, source=name)
            eval_set = None
            if eval_rows is not None:
                eval_set = encode_dataset(eval_rows, encoder, keep_rows=True, source=eval_name)
        flag_checks.check_rows(args, train_set, eval_set)
        resumed = resumed.check_rows((data_args, student_args, args), train_set)
        if args.preflight != "off" and main_process:
            preflight.show(train_set, encoder, teacher_tokenizer, [c for c, _ in configs], student_args, args)

    if args.preflight == "only":
        return
    if main_process:
        leave_behind(args.output_dir, checkpoint)
        data = {"train": summarize_rows(data_args.dataset_name, train_set)}
        data |= {} if eval_set is None else {"held out": summarize_rows(eval_name, eval_set)}
        write_record(args.output_dir, (data_args, student_args, args), parser.given, data, args.world_size, resumed)
        if checkpoint is None:  # of an earlier attempt that left no checkpoint
            Path(args.output_dir, FOLDER, "results.json").unlink(missing_ok=True)
    keep_template_kwargs(tokenizer, args.chat_template_kwargs)

    with refusals("train_gkd.py"):
        student = models.load_student(student_args, args)
        teacher = None if cache is not None or args.teacher_is_student else models.load_teacher(args)
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=args,
            train_dataset=train_set,
            eval_dataset=eval_set,
            processing_class=tokenizer,
            teacher_processing_class=teacher_tokenizer,
            peft_config=lora_config(student_args),
            teacher_cache=cache,
        )
    trainer.eval_data_name = eval_name
    with StopOnSignal() as trainer.stop:
        trainer.train(resume_from_checkpoint=checkpoint, changed=resumed.changed)
    if trainer.stopped:
        if main_process:
            print(f"Stopped after step {trainer.state.global_step}, which is saved. Go on with:\n{resume_command()}")
        trainer.accelerator.end_training()
        return
    trainer.save_model(args.output_dir)
    out = args.output_dir
    whole = f"The model in {out} is whole: eval_gkd.py {out} evaluates it, python -m gkd.cli.report {out} writes the report."
    with one_line_errors("train_gkd.py", whole):
        trainer.save_state()
        if eval_set is not None:
            trainer.evaluate()
            trainer.save_state()  # with its figures
        if trainer.is_world_process_zero():
            print_summary(trainer.state.log_history, out, args.divergence)
            if eval_set is not None:
                mine = comparable(read_results(out), eval_name)
                ends = [r for r in mine if r["model"] in ("before", "after", "teacher")]
                print_results(in_order(ends), f"Held out: {eval_name}, {len(eval_set)} rows")
            print(f"Report: {write_report(out, out)}")
            if trainer.skipped_summary is not None:
                print(trainer.skipped_summary)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    record(main)()  # a launcher then tells why a rank ended
