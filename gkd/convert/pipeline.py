"""From inputs to outputs: reads, converts, chooses and writes, one row at a time."""

import argparse
import contextlib
import functools
import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gkd.convert.files import HubRows, RowFile, open_inputs
from gkd.convert.formats import Options, detect, to_chat
from gkd.convert.report import Report
from gkd.convert.shaping import Row, Spool, is_held_out, normalized_prompt
from gkd.convert.writers import open_writer
from gkd.rows import DataError


class BadRows:
    """What becomes of bad rows: an error, a count, or a line of a file with place, reason and row."""

    def __init__(self, mode: str, path: Path | None, report: Report):
        self.mode, self.path, self.report = mode, path, report
        self._temporary = path and path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._file = self._temporary.open("w", encoding="utf-8") if self._temporary else None

    def add(self, place: str, row: Any, reason: str) -> None:
        if self.mode == "error":
            raise DataError(f"{place}: {reason} --on-bad skip, or collect FILE, goes on without such rows.")
        self.report.bad += 1
        if self._file is not None:
            self._file.write(json.dumps({"place": place, "reason": reason, "row": row}, default=str) + "\n")

    def commit(self) -> None:
        if self._file is not None:
            self._file.close()
            os.replace(self._temporary, self.path)

    def discard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


class Conversion:
    """One run of convert_data.py; `args` are its arguments."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.report = args, Report()
        self.options = Options(args.source_field, args.target_field, args.system, args.template, args.drop_answers)
        self.detected: list[str] = []
        self.bad = BadRows(args.on_bad[0], args.collect, self.report)
        self._seen: set[int] = set()
        self._length = _token_counter(args.tokenizer) if args.tokenizer else None

    def chat_rows(self, source: RowFile | HubRows) -> Iterator[tuple[Callable[[], str], Row]]:
        """The chat rows of an input, each behind a function that tells its place, which few rows are asked for."""
        name = self.args.format
        size = source.path.stat().st_size if isinstance(source, RowFile) else None
        with tqdm(total=size, unit="B", unit_scale=True, desc=source.name, leave=False, disable=None) as bar:
            for count, (number, row, problem) in enumerate(source):
                self.report.read += 1
                if count % 1024 == 0:
                    bar.update(source.position() - bar.n)
                try:
                    if problem:
                        raise DataError(problem)
                    if name is None:
                        name, evidence = detect(row, self.options)
                        file = ", ".join(filter(None, (source.kind, source.compression, source.encoding)))
                        self.detected.append(f"{source.name}: {file}; {name} rows by {evidence}")
                    yield functools.partial(source.place, number), to_chat(row, name, self.options)
                except DataError as error:
                    self.bad.add(source.place(number), row, str(error))

    def keep(self, row: Row) -> tuple[str, int | None] | None:
        """The normalised prompt and token count of a row that goes on; None if a flag drops it."""
        prompt = normalized_prompt(row)
        hashed = hash(prompt)  # 64 bits, a good deal less memory than the prompts themselves
        tokens = self._length(row) if self._length else None
        if self.args.max_tokens and tokens > self.args.max_tokens:
            self.report.dropped["--max-tokens"] += 1
            return None
        if hashed in self._seen:
            if self.args.dedupe:
                self.report.dropped["--dedupe"] += 1
                return None
            self.report.duplicates += 1
        self._seen.add(hashed)
        return prompt, tokens

    def run(self) -> None:
        args, report = self.args, self.report
        with contextlib.ExitStack() as stack:
            stack.callback(self.bad.discard)
            groups = [stack.enter_context(open_inputs([name], args.encoding)) for name in args.inputs]
            writer, heldout = open_writer(args.output), open_writer(args.heldout) if args.split else None
            outputs = [out for out in (writer, heldout) if out is not None]
            for out in outputs:
                stack.callback(out.discard)  # does nothing after commit
            rows = ((place, row) for group in groups for source in group for place, row in self.chat_rows(source))
            if args.shuffle or args.mix:
                spool = Spool()
                for group in groups:
                    spool.start_source()
                    for source in group:
                        for place, row in self.chat_rows(source):
                            spool.add(place(), row)
                rows = spool.rows(args.seed, args.weights)
            for place, row in rows:
                kept = self.keep(row)
                if kept is None:
                    continue
                out = heldout if heldout is not None and is_held_out(kept[0], args.split) else writer
                try:
                    out.write(row)
                except DataError as error:
                    self.bad.add(place(), row, str(error))
                    continue
                report.held_out += out is heldout
                report.add(row, kept[1])
                if report.written == args.limit:
                    break
            if report.written == 0:
                raise DataError(f"{', '.join(args.inputs)}: no rows to write.")
            for out in (*outputs, self.bad):
                out.commit()


def _token_counter(name: str) -> Callable[[Row], int]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(f"--tokenizer {name} can't be loaded: {error}") from None

    def count(row: Row) -> int:
        if tokenizer.chat_template is None:
            return len(tokenizer("\n".join(message["content"] for message in row["messages"]))["input_ids"])
        text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return count


def convert(args: argparse.Namespace) -> tuple[Report, list[str]]:
    """Runs a conversion; returns its report and what was detected.

    Raises:
        DataError: bad data, with its place. No output is left behind.
    """
    gc.set_threshold(
        100_000
    )  # rows are trees that die by themselves; looking for cycles among them takes 3% of the time
    conversion = Conversion(args)
    conversion.run()
    return conversion.report, conversion.detected
