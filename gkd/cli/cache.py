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
all others; the student learns from exactly that. `--keep hidden` stores the teacher's last hidden states and its output
head instead, which are all that it says. If caching is interrupted, the same command continues it.
"""

import shutil
from itertools import chain

import datasets
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm

from gkd.cli import checks as flag_checks
from gkd.config.caching import CacheArguments, make_parser
from gkd.data.encoding import scored_tokens
from gkd.data.loading import check_rows, load_rows
from gkd.io.errors import one_line_errors, refusals
from gkd.models.loading import stored_dtype
from gkd.models.pairing import Pairing
from gkd.teachers import describe
from gkd.teachers.cache_files import CacheWriter, cache_settings
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
        crossing = args.cross_tokenizer != "off"
        pairing = Pairing.of_teacher(teacher, args) if crossing else Pairing.read(args, teacher, args)
        teacher.rehearse()
        accelerator = Accelerator()
        with accelerator.main_process_first():
            encoded = pairing.encode(rows, source=args.dataset_name, keep_rows=crossing)
            settings = cache_settings(args, pairing, encoded, teacher.fingerprints)
            cache = CacheWriter(args.output_dir, settings, len(encoded), args.rows_per_shard, pairing.tokenizer)
        rank, ranks = accelerator.process_index, accelerator.num_processes
        missing = sorted(gather_object(cache.missing(rank, ranks)))  # before any rank writes one
        if missing and args.keep == "hidden":
            size = check_space(args, pairing, encoded, cache, missing, teacher.head_size)
            accelerator.print(size)

    if missing:
        with refusals(prog):
            teacher_pass = TeacherPass(teacher.load(), accelerator, pairing, args)
        datasets.disable_progress_bars()
        shards = missing[rank::ranks]
        total = sum(len(cache.parts[shard]) for shard in shards)
        with tqdm(total=total, unit="row", disable=not accelerator.is_main_process) as bar:

            def show(phase: str, rows_done: int) -> None:
                bar.set_description(phase)
                bar.update(rows_done)

            for shard in shards:
                rows_of_shard = encoded.select(cache.parts[shard]).to_list()
                cache.write(shard, teacher_pass(rows_of_shard, shard, show), teacher_pass.head)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        totals = cache.finish()
        size, tail = (totals[name] / max(totals["tokens"], 1) for name in ("bytes", "tail_mass"))
        print(f"{args.output_dir}: {totals['rows']:,} rows, {totals['tokens']:,} scored tokens of {size:.0f} bytes.")
        if args.keep == "topk":
            print(f"{tail:.2%} of the teacher's probability lies outside of its top {args.top_k}.")
        crossed = f" --cross_tokenizer {args.cross_tokenizer}" if crossing else ""
        print(f"gkd train --teacher_cache {args.output_dir}{crossed} --lmbda 0 ...")
    accelerator.end_training()


def check_space(
    args: CacheArguments,
    pairing: Pairing,
    encoded: Dataset,
    cache: CacheWriter,
    missing: list[int],
    head_size: tuple[int, int] | None = None,
) -> str:
    """The size of the hidden states and the head that are still to be written, as a sentence.

    Raises ValueError if the disk has less room than that, for text that is yet to be written than one token a row takes.
    """
    rows = encoded.select(chain.from_iterable(cache.parts[shard] for shard in missing))
    least = most = scored_tokens(rows)
    if args.seq_kd:
        least, most = len(rows), len(rows) * args.max_new_tokens
    if head_size is not None:  # of a teacher elsewhere, which tells it
        _, position = head_size
    else:
        config = pairing.models[-1].config
        position = config.get_text_config().hidden_size * stored_dtype(config, args.teacher_dtype).itemsize
    head = pairing.vocab_size * position if 0 in missing else 0
    smallest, largest = ((head + tokens * position) / 1e9 for tokens in (least, most))
    free = shutil.disk_usage(args.output_dir).free / 1e9
    up_to = "up to " if args.seq_kd else ""
    size = f"{up_to}{most:,} scored tokens of {position:,} bytes, with the head {up_to}{largest:,.2f} GB"
    if smallest > free:
        raise ValueError(
            f"--keep hidden stores {size}, and the disk of {args.output_dir} has {free:,.2f} GB left: free some, choose "
            "another --output_dir, take fewer rows, or keep the top k (--keep topk)."
        )
    return f"--keep hidden stores {size}; {free:,.2f} GB are free{'' if largest <= free else ', which may not do'}."
