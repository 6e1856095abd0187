"""From inputs to outputs: reads, converts, chooses (duplicates, length, held-out split, mixing) and writes rows."""

import argparse
import contextlib
import functools
import gc
import json
import random
import tempfile
import unicodedata
from array import array
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gkd.convert.files import HubRows, RowFile
from gkd.convert.formats import Options, Row, detect, to_chat
from gkd.convert.inputs import open_input
from gkd.convert.report import Report
from gkd.convert.writers import AsideFile, Writer, dumps, writer_of
from gkd.data.rows import DataError, encoded
from gkd.io.errors import one_line
from gkd.io.files import naming
from gkd.io.paths import check_model
from gkd.io.terminal import visible

# A row behind a function that gives its place, since few rows need it.
PlacedRow = tuple[Callable[[], str], Row]


def normalized_prompt(row: Row) -> str:
    """A prompt's text, NFKC-normalised and with its white space collapsed: equal for equal questions."""
    text = "\n".join([message["content"] for message in row["messages"][:-1]])
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.split())


def is_held_out(prompt: str, share: float) -> bool:
    """Whether a prompt is held out: decided by its hash alone, so it stays on its side when the file grows."""
    digest = blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


class Conversion:
    """One run of convert_data.py; `args` are its arguments."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.report = args, Report()
        self.options = Options(args.source_field, args.target_field, args.system, args.template, args.drop_answers)
        self._first_bad = ""
        self._collected: AsideFile | None = None  # bad rows, with their places and reasons
        self._seen: set[int] = set()
        self._length = _token_counter(args.tokenizer) if args.tokenizer else None

    def _chat_rows(self, source: RowFile | HubRows) -> Iterator[PlacedRow]:
        name = self.args.format
        size = source.path.stat().st_size if isinstance(source, RowFile) else None
        with tqdm(total=size, unit="B", unit_scale=True, desc=visible(source.name), leave=False, disable=None) as bar:
            for count, (number, row, problem) in enumerate(source):
                self.report.read += 1
                if count % 1024 == 0:
                    bar.update(source.position() - bar.n)
                try:
                    if problem:
                        raise DataError(problem)
                    if name is None:
                        name, evidence = detect(row, self.options)
                        self.report.detected.append(f"{source.name}: {source.description}; {name} rows by {evidence}")
                    chat, remarks = to_chat(row, name, self.options)
                    if remarks:
                        self.report.remark(remarks, source.place(number))
                    yield functools.partial(source.place, number), chat
                except DataError as error:
                    self._leave_out(source.place(number), row, error)

    def _leave_out(self, place: str, row: Any, error: DataError) -> None:
        """Stops at a bad row, counts it, or writes it to a file too, as --on-bad says."""
        if self.args.on_bad[0] == "error":
            raise DataError(f"{place}: {error} --on-bad skip, or collect FILE, goes on without such rows.")
        self.report.bad += 1
        self._first_bad = self._first_bad or f"{place}: {error}"
        if self._collected is not None:
            told = {"place": place, "reason": str(error)}
            try:
                line = json.dumps(told | {"row": row}, default=str)
            except (RecursionError, TypeError, ValueError):  # nested too deeply, or with keys that are not text
                line = json.dumps(told | {"row": str(row)})
            self._collected.append(line.encode() + b"\n")

    def write(self, row: Row, writer: Writer, heldout: Writer | None) -> None:
        """Writes a row, unless a flag drops it. Raises DataError if it can't be written."""
        tokens = None
        if self._length is not None:
            encoded("".join(message["content"] for message in row["messages"]))  # tokenizers take only Unicode
            tokens = self._length(row)
            if self.args.max_tokens and tokens > self.args.max_tokens:
                self.report.dropped["--max-tokens"] += 1
                return
        prompt = normalized_prompt(row)
        hashed = hash(prompt)  # 64 bits, a good deal less memory than the prompts themselves
        is_duplicate = hashed in self._seen
        if is_duplicate and self.args.dedupe:
            self.report.dropped["--dedupe"] += 1
            return
        out = heldout if heldout is not None and is_held_out(prompt, self.args.split) else writer
        out.write(row)
        self._seen.add(hashed)
        self.report.duplicates += is_duplicate
        self.report.held_out += out is heldout
        self.report.add(row, tokens)

    def run(self) -> Report:
        """Reads, chooses and writes all rows. Raises DataError on bad data, with its place; no output is left behind."""
        gc.set_threshold(100_000)  # rows hold no reference cycles, and looking for some takes a tenth of the time
        args, report = self.args, self.report
        with contextlib.ExitStack() as stack:

            def aside(output):
                stack.callback(output.discard)  # does nothing after commit
                output.open()
                return output

            outputs = [path for path in (args.output, args.split and args.heldout, args.collect) if path]
            groups = [open_input(name, args.encoding, outputs, report.passed_over, stack) for name in args.inputs]
            self._collected = aside(AsideFile(args.collect)) if args.collect else None
            writer = aside(writer_of(args.output, args.prompt_completion))
            heldout = aside(writer_of(args.heldout, args.prompt_completion)) if args.split else None
            rows = (placed for group in groups for source in group for placed in self._chat_rows(source))
            for place, row in self._shuffled(groups) if args.shuffle or args.mix else rows:
                try:
                    self.write(row, writer, heldout)
                except DataError as error:
                    self._leave_out(place(), row, error)
                if report.written == args.limit:
                    break
            if left := report.read - report.bad - report.written - sum(report.dropped.values()):
                flags = (flag for flag, given in (("--mix", args.mix), ("--limit", args.limit)) if given)
                report.dropped[" and ".join(flags)] = left
            outputs = [out for out in (writer, heldout, self._collected) if out is not None]
            for out in outputs:
                out.close()
            if not writer.rows:
                if self._collected is not None:
                    self._collected.commit()
                raise DataError(f"{', '.join(args.inputs)}: no rows to write. {self._why_none()}")
            for out in outputs:
                out.commit()
        return report

    def _shuffled(self, groups: list[list[RowFile | HubRows]]) -> Iterator[PlacedRow]:
        """All rows in an order drawn from --seed; with --mix, as many of each input as its weight allows, none twice.

        They wait on disk, with their places; memory holds 8 bytes per row.
        """
        offsets, chosen, draw = [array("Q") for _ in groups], array("Q"), random.Random(self.args.seed)
        with tempfile.TemporaryFile(prefix="gkd-rows-") as spool:
            for own, group in zip(offsets, groups, strict=True):
                for place, row in (placed for source in group for placed in self._chat_rows(source)):
                    try:
                        line = encoded(dumps((place(), row)))
                    except DataError as error:
                        self._leave_out(place(), row, error)
                        continue
                    own.append(spool.tell())
                    with naming(tempfile.gettempdir()):
                        spool.write(line + b"\n")
            if weights := self.args.weights:
                scale = min(len(own) / weight for own, weight in zip(offsets, weights, strict=True))
                offsets = (draw.sample(own, round(scale * w)) for own, w in zip(offsets, weights, strict=True))
            for own in offsets:
                chosen.extend(own)
            draw.shuffle(chosen)
            for offset in chosen:
                spool.seek(offset)
                place, row = json.loads(spool.readline())
                yield functools.partial(str, place), row

    def _why_none(self) -> str:
        reasons = [f"{flag} dropped {count:,}." for flag, count in self.report.dropped.items()]
        if self.report.held_out:
            reasons.append(f"--split held out all {self.report.held_out:,}.")
        if self.report.bad:
            reasons.append(f"{self.report.bad:,} are bad, the first at {self._first_bad}")
        return " ".join(reasons)


def _token_counter(name: str) -> Callable[[Row], int]:
    if not Path(name).is_dir():
        try:
            check_model("--tokenizer", name)
        except ValueError as error:
            raise DataError(str(error)) from None
    from transformers import AutoTokenizer  # here, since importing it takes seconds

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a broken file raises what it likes
        raise DataError(f"--tokenizer {name} can't be loaded: {one_line(error)}") from None

    def count(row: Row) -> int:
        if tokenizer.chat_template is None:
            return len(tokenizer("\n".join(message["content"] for message in row["messages"]))["input_ids"])
        try:
            extra = row.get("chat_template_kwargs") or {}
            text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False, **extra)
        except Exception as error:  # templates raise what they like, "system role not supported" for one
            raise DataError(f"the tokenizer's chat template refuses it: {one_line(error)}") from None
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return count
