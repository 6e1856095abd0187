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
from gkd.convert.inputs import open_inputs
from gkd.convert.report import Report
from gkd.convert.writers import AsideFile, Writer, dumps, writer_of
from gkd.data.rows import DataError, encoded
from gkd.io.errors import one_line
from gkd.io.paths import check_model
from gkd.io.terminal import visible


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


class Spool:
    """Rows with their places, kept on disk and read back in any order; memory holds 8 bytes per row."""

    def __init__(self):
        self._file = tempfile.TemporaryFile(prefix="gkd-rows-")  # noqa: SIM115 — deleted when the spool goes
        self._offsets: list[array] = []

    def start_source(self) -> None:
        self._offsets.append(array("Q"))

    def add(self, place: str, row: Row) -> None:
        line = encoded(dumps((place, row)))
        self._offsets[-1].append(self._file.tell())
        try:
            self._file.write(line + b"\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from None

    def rows(self, seed: int, weights: list[float] | None = None) -> Iterator[tuple[Callable[[], str], Row]]:
        """All rows shuffled; with `weights`, as many of each source as their proportion allows, none twice."""
        draw = random.Random(seed)
        chosen = array("Q")
        if weights is None:
            for offsets in self._offsets:
                chosen.extend(offsets)
        else:
            scale = min(len(offsets) / weight for offsets, weight in zip(self._offsets, weights, strict=True))
            for offsets, weight in zip(self._offsets, weights, strict=True):
                chosen.extend(draw.sample(offsets, round(scale * weight)))
        draw.shuffle(chosen)
        for offset in chosen:
            self._file.seek(offset)
            place, row = json.loads(self._file.readline())
            yield functools.partial(str, place), row


class BadRows:
    """Handles bad rows: raises, counts them, or writes each to a file with place and reason."""

    def __init__(self, mode: str, file: AsideFile | None):
        self.mode, self.file, self.count, self.first = mode, file, 0, ""

    def add(self, place: str, row: Any, reason: str) -> None:
        if self.mode == "error":
            raise DataError(f"{place}: {reason} --on-bad skip, or collect FILE, goes on without such rows.")
        self.count += 1
        self.first = self.first or f"{place}: {reason}"
        if self.file is not None:
            try:
                line = json.dumps({"place": place, "reason": reason, "row": row}, default=str)
            except (RecursionError, TypeError, ValueError):  # nested too deeply, or with keys that are not text
                line = json.dumps({"place": place, "reason": reason, "row": str(row)})
            self.file.append(line.encode() + b"\n")


class Conversion:
    """One run of convert_data.py; `args` are its arguments."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.report = args, Report()
        self.options = Options(args.source_field, args.target_field, args.system, args.template, args.drop_answers)
        self.detected: list[str] = []
        self._seen: set[int] = set()
        self._length = _token_counter(args.tokenizer) if args.tokenizer else None

    def chat_rows(self, source: RowFile | HubRows) -> Iterator[tuple[Callable[[], str], Row]]:
        """The chat rows of an input, each with a function that gives its place, since few rows need it."""
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
                        self.detected.append(f"{source.name}: {source.description}; {name} rows by {evidence}")
                    chat, remarks = to_chat(row, name, self.options)
                    if remarks:
                        self.report.remark(remarks, source.place(number))
                    yield functools.partial(source.place, number), chat
                except DataError as error:
                    self.bad.add(source.place(number), row, str(error))

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

    def run(self) -> None:
        args, report = self.args, self.report
        with contextlib.ExitStack() as stack:

            def aside(output):
                stack.callback(output.discard)  # does nothing after commit
                output.open()
                return output

            outputs = [path for path in (args.output, args.split and args.heldout, args.collect) if path]
            groups = [
                stack.enter_context(open_inputs([name], args.encoding, outputs, report.passed_over))
                for name in args.inputs
            ]
            self.bad = BadRows(args.on_bad[0], aside(AsideFile(args.collect)) if args.collect else None)
            writer = aside(writer_of(args.output, args.prompt_completion))
            heldout = aside(writer_of(args.heldout, args.prompt_completion)) if args.split else None
            rows = ((place, row) for group in groups for source in group for place, row in self.chat_rows(source))
            if args.shuffle or args.mix:
                rows = self._shuffled(groups)
            for place, row in rows:
                try:
                    self.write(row, writer, heldout)
                except DataError as error:
                    self.bad.add(place(), row, str(error))
                if report.written == args.limit:
                    break
            report.bad = self.bad.count
            if left := report.read - report.bad - report.written - sum(report.dropped.values()):
                flags = (flag for flag, given in (("--mix", args.mix), ("--limit", args.limit)) if given)
                report.dropped[" and ".join(flags)] = left
            outputs = [out for out in (writer, heldout, self.bad.file) if out is not None]
            for out in outputs:
                out.close()
            if not writer.rows:
                if self.bad.file is not None:
                    self.bad.file.commit()
                raise DataError(f"{', '.join(args.inputs)}: no rows to write. {self._why_none()}")
            for out in outputs:
                out.commit()

    def _shuffled(self, groups: list[list[RowFile | HubRows]]) -> Iterator[tuple[Callable[[], str], Row]]:
        spool = Spool()
        for group in groups:
            spool.start_source()
            for source in group:
                for place, row in self.chat_rows(source):
                    try:
                        spool.add(place(), row)
                    except DataError as error:
                        self.bad.add(place(), row, str(error))
        return spool.rows(self.args.seed, self.args.weights)

    def _why_none(self) -> str:
        reasons = [f"{flag} dropped {count:,}." for flag, count in self.report.dropped.items()]
        if self.report.held_out:
            reasons.append(f"--split held out all {self.report.held_out:,}.")
        if self.bad.count:
            reasons.append(f"{self.bad.count:,} are bad, the first at {self.bad.first}")
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


def convert(args: argparse.Namespace) -> tuple[Report, list[str]]:
    """Runs a conversion; returns its report and what was detected.

    Raises:
        DataError: bad data, with its place. No output is left behind.
    """
    # Rows hold no reference cycles, and looking for some takes a tenth of the time.
    gc.set_threshold(100_000)
    conversion = Conversion(args)
    conversion.run()
    return conversion.report, conversion.detected
