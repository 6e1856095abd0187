r"""Converts common dataset formats to the `messages`/`prompt` rows that `gkd train` reads, and prints what it read.

    gkd convert alpaca.json -o data/rows.json
    gkd convert pairs.jsonl -o data/rows.json --source-field zh --target-field en --drop-answers \
        --system 帮我把下面中文翻译成英文
    gkd convert sharegpt.json.gz folder/ -o rows.jsonl --dedupe --split 0.02 --on-bad collect bad.jsonl
    gkd convert -o mixed.json --mix chat.jsonl:0.7 math.parquet:0.3 --seed 1 --limit 50000
    cat prompts.txt | gkd convert - -o rows.json

Reads JSON, JSON lines, CSV, TSV, Parquet and text (one prompt a line), plain, gzip, zstd, bzip2, xz or zip, in UTF-8,
UTF-16 or GB18030, from files, folders, a pipe (JSON or text) or the hub; see docs/data.md for the formats of rows. Writes
.json, .jsonl or .parquet by the ending of OUT. Exit codes: 0 done, 1 bad data, 2 wrong usage, 128 + n stopped by signal n.
"""

import argparse
import io
import math
import os
import sys
from pathlib import Path

from gkd.config.command_line import CommandParser
from gkd.convert.formats import FORMATS
from gkd.convert.inputs import UsageError
from gkd.convert.pipeline import Conversion
from gkd.convert.writers import SUFFIXES
from gkd.data.rows import DataError
from gkd.io.errors import one_line_errors
from gkd.io.terminal import visible


def parse_arguments(argv: list[str] | None, doc: str, prog: str = "gkd convert") -> argparse.Namespace:
    parser = CommandParser(prog=prog, description=doc)
    flag = parser.add_argument
    flag("inputs", nargs="*", metavar="IN", help="files, folders, hub ids, or - for a pipe")
    flag("-o", "--output", required=True, type=Path, metavar="OUT", help=f"one of {', '.join(SUFFIXES)}")
    flag("--overwrite", action="store_true", help="replace OUT if it exists")
    flag = parser.add_argument_group("reading").add_argument
    flag("--from", dest="format", choices=FORMATS, help="format of the rows (default: detected)")
    flag("--encoding", help="of text files (default: detected)")
    flag("--source-field", help="translation pairs: the column to translate")
    flag("--target-field", help="translation pairs: the column with the translation")
    flag("--template", default="{source}", help="translation pairs: the question, with {source} in it")
    flag("--system", help="system prompt for rows that have none")
    flag(
        "--on-bad",
        nargs="+",
        default=["error"],
        metavar="error|skip|collect FILE",
        help="stop at a bad row (default), leave it out and count it, or write it to FILE with its place and reason",
    )
    flag = parser.add_argument_group("shaping").add_argument
    flag(
        "--prompt-completion",
        action="store_true",
        help="write `prompt` and `completion`, lists of messages, in place of `messages`: TRL's SFT reads them too",
    )
    flag("--drop-answers", action="store_true", help="write empty last answers: prompts only")
    flag("--dedupe", action="store_true", help="keep the first row of each prompt (NFKC, white space collapsed)")
    flag("--tokenizer", help="folder or hub id; lengths are of the templated conversation")
    flag("--max-tokens", type=int, help="leave out longer rows; needs --tokenizer")
    flag("--mix", nargs="+", metavar="IN:WEIGHT", help="inputs by proportion, shuffled, none repeated")
    flag("--shuffle", action="store_true", help="in an order drawn from --seed")
    flag("--seed", type=int, default=0)
    flag("--limit", type=int, help="at most this many rows")
    flag("--split", type=float, help="share of prompts for OUT.heldout, chosen by the prompt's hash")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw turns and lengths")
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Checks the flags together, and derives `weights`, `heldout` and `collect` from them."""
    args.weights = None
    if args.mix:
        if args.inputs:
            parser.error("--mix names the inputs: leave the others away.")
        try:
            args.inputs, weights = zip(*(word.rsplit(":", 1) for word in args.mix), strict=True)
            args.weights = tuple(map(float, weights))
        except ValueError:
            parser.error("--mix takes IN:WEIGHT, such as chat.jsonl:0.7 math.jsonl:0.3.")
        if not all(weight > 0 and math.isfinite(weight) for weight in args.weights):
            parser.error("--mix: weights must be positive numbers.")
    way, *file = args.on_bad
    refused = {
        "no input: name files, folders, hub ids, or - for a pipe.": not args.inputs,
        f"{args.output}: the ending must be one of {', '.join(SUFFIXES)}.": args.output.suffix not in SUFFIXES,
        "--on-bad takes error, skip, or collect FILE.": len(file) != {"error": 0, "skip": 0, "collect": 1}.get(way),
        "--from translation needs --source-field.": args.format == "translation" and not args.source_field,
        "--source-field needs --target-field, or --drop-answers.": (
            args.source_field and not (args.target_field or args.drop_answers)
        ),
        "--template must hold {source}.": "{source}" not in args.template,
        "--max-tokens needs --tokenizer.": args.max_tokens and not args.tokenizer,
        "--split must lie between 0 and 1.": args.split is not None and not 0 < args.split < 1,
        "--limit must be at least 1.": args.limit is not None and args.limit < 1,
        "--max-tokens must be at least 1.": args.max_tokens is not None and args.max_tokens < 1,
    }
    for message, applies in refused.items():
        if applies:
            parser.error(message)
    args.heldout = args.output.with_suffix(f".heldout{args.output.suffix}")
    args.collect = Path(file[0]) if file else None
    if args.encoding:
        try:
            "a".encode(args.encoding)
        except (LookupError, UnicodeError):
            parser.error(f"--encoding {args.encoding}: Python knows no such encoding of text.")
    paths = [path for path in (args.output, args.split and args.heldout, args.collect, args.plot) if path]
    if len({path.resolve() for path in paths}) < len(paths):
        parser.error("two outputs have the same name.")
    for path in paths:
        if path.is_dir():
            parser.error(f"{path} is a folder.")
        if path.exists() and not path.is_file():
            parser.error(f"{path} is no regular file.")
        if path.exists() and not args.overwrite:
            parser.error(f"{path} exists; --overwrite replaces it.")
        if not path.absolute().parent.is_dir():
            parser.error(f"{path}: no such folder.")


def main(argv: list[str] | None = None, prog: str = "gkd convert") -> None:
    with one_line_errors(prog):
        convert_data(argv, prog)


def convert_data(argv: list[str] | None, prog: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal's encoding may lack letters that rows hold
            stream.reconfigure(errors="backslashreplace")
    args = parse_arguments(argv, __doc__, prog)
    try:
        run(args)
    except BrokenPipeError:  # the reader of the summary closed the pipe; rich exits in the same way
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (DataError, OSError) as error:
        reason = error
        if isinstance(error, OSError) and error.filename is not None:
            reason = f"{error.filename}: {error.strerror}"
        print(visible(f"{prog}: {reason}"), file=sys.stderr)
        sys.exit(2 if isinstance(error, FileNotFoundError | UsageError) else 1)


def run(args: argparse.Namespace) -> None:
    report = Conversion(args).run()
    report.print()
    if args.plot:
        report.plot(args.plot)
    print(f"{args.output}: {report.written - report.held_out:,} rows, {report.empty:,} with an empty answer.")
    if args.split:
        print(f"{args.heldout}: {report.held_out:,} rows." if report.held_out else "No row was held out.")
    if report.bad:
        print(f"{report.bad:,} bad rows left out" + (f"; they are in {args.collect}." if args.collect else "."))
    sys.stdout.flush()
