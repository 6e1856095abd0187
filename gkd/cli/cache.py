r"""Stores the teacher's output for each scored token, so that `gkd train --teacher_cache` needs no teacher in memory.

For the answers of a dataset, on two GPUs:

    gkd cache --accelerate_config ddp --num_processes 2 \
        --model_name_or_path meta-llama/Llama-3.2-1B-Instruct \
        --teacher_model_name_or_path meta-llama/Llama-3.1-8B-Instruct --dataset_name data/sample_answers.json \
        --output_dir caches/answers

For text that the teacher writes, without a launcher; then a run that loads no teacher:

    gkd cache --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \
        --dataset_name data/prompts_train.json --output_dir caches/written --seq_kd True --batch_size 64
    gkd train --model_name_or_path STUDENT --teacher_cache caches/written --lmbda 0 --output_dir runs/cached

At each position the --top_k likeliest tokens are stored with their log-probabilities, and the total probability of
all others; the student learns from exactly that. If caching is interrupted, the same command continues it.
"""

import datasets
from accelerate import Accelerator
from tqdm.auto import tqdm

from gkd.cli import checks as flag_checks
from gkd.config.caching import CacheArguments, make_parser
from gkd.data.loading import check_rows, load_rows
from gkd.io.errors import one_line_errors, refusals
from gkd.models.pairing import Pairing
from gkd.teachers import describe
from gkd.teachers.cache import CacheWriter, cache_settings
from gkd.teachers.caching import TeacherPass


def main(argv: list[str] | None = None, prog: str = "gkd cache") -> None:
    with one_line_errors(prog, "Shards that are done are kept: the same command goes on."):
        cache_teacher(make_parser(prog=prog, description=__doc__).parse_one(argv), prog)


def cache_teacher(args: CacheArguments, prog: str) -> None:
    # Bad input is reported here, before a model loads.
    with refusals(prog):
        flag_checks.outside_of_data(args.output_dir, args.dataset_name)
        rows = load_rows(args.dataset_name, args.dataset_train_split, args.dataset_config)
        check_rows(rows, args.dataset_name, needs_answers=not args.seq_kd)
        teacher = describe(args)
        pairing = Pairing.read(args, teacher, args)
        teacher.rehearse()
        accelerator = Accelerator()
        with accelerator.main_process_first():
            encoded = pairing.encode(rows, source=args.dataset_name)
            settings = cache_settings(args, pairing, encoded)
            cache = CacheWriter(args.output_dir, settings, len(encoded), args.rows_per_shard)
        missing = cache.missing()

    accelerator.wait_for_everyone()  # no rank writes a shard before all have listed the missing ones
    if missing:
        with refusals(prog):
            teacher_pass = TeacherPass(teacher.load(), accelerator, pairing, args)
        datasets.disable_progress_bars()
        shards = missing[accelerator.process_index :: accelerator.num_processes]
        total = sum(len(cache.parts[shard]) for shard in shards)
        with tqdm(total=total, unit="row", disable=not accelerator.is_main_process) as bar:

            def show(phase: str, rows_done: int) -> None:
                bar.set_description(phase)
                bar.update(rows_done)

            for shard in shards:
                cache.write(shard, teacher_pass(encoded.select(cache.parts[shard]).to_list(), shard, show))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        totals = cache.finish()
        size, tail = (totals[name] / max(totals["tokens"], 1) for name in ("bytes", "tail_mass"))
        print(f"{args.output_dir}: {totals['rows']:,} rows, {totals['tokens']:,} scored tokens of {size:.0f} bytes.")
        print(f"{tail:.2%} of the teacher's probability lies outside of its top {args.top_k}.")
        print(f"gkd train --teacher_cache {args.output_dir} --lmbda 0 ...")
    accelerator.end_training()
