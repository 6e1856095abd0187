"""Converts alpaca files and translation pairs to the `messages`/`prompt` rows that train_gkd.py reads.

    python convert_data.py alpaca.json -o data/rows.json
    python convert_data.py pairs.jsonl -o data/rows.json --source-field zh --target-field en --drop-answers \
        --system 帮我把下面中文翻译成英文

Input: a JSON array or JSON lines. `--drop-answers` writes empty assistant answers: prompts only, for the teacher or the
student to answer (train_gkd.py --seq_kd True, or --lmbda 1). Exit codes: 0 done, 1 bad data, 2 wrong usage.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Message = dict[str, str]


class BadRow(ValueError):
    """A row can't be converted; the message says where it is and why."""


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, row) of a JSON array or JSON lines, place being the file with its row or line.

    Raises:
        BadRow: not UTF-8, or broken JSON, with the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRow(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8.") from None
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadRow(f"{path}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}.") from None
        yield from ((f"{path}, row {index}", row) for index, row in enumerate(rows))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise BadRow(f"{path}, line {number}: broken JSON: {error.msg}.") from None


def _text(row: dict[str, Any], field: str, needed: bool = False) -> str:
    if field not in row and needed:
        raise BadRow(f"no field {field!r}; the row has {', '.join(map(repr, row)) or 'none'}.")
    value = row.get(field) or ""
    if not isinstance(value, str):
        raise BadRow(f"{field!r} must be text, not {type(value).__name__}.")
    if needed and not value.strip():
        raise BadRow(f"{field!r} is empty; remove the row or fill it in.")
    return value


def _turn(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def from_alpaca(row: dict[str, Any], args: argparse.Namespace) -> list[Message]:
    """instruction, input, output, with optional system and history ([[question, answer], ...])."""
    question = _text(row, "instruction", needed=True)
    if _text(row, "input"):
        question += "\n" + row["input"]
    system = _text(row, "system") or args.system
    messages = [{"role": "system", "content": system}] if system else []
    for turn in row.get("history") or []:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise BadRow("'history' must be a list of [question, answer] pairs.")
        messages += _turn(*turn)
    return messages + _turn(question, _text(row, "output"))


def from_translation(row: dict[str, Any], args: argparse.Namespace) -> list[Message]:
    """Two columns, named by --source-field and --target-field."""
    messages = [{"role": "system", "content": args.system}] if args.system else []
    target = "" if args.drop_answers else _text(row, args.target_field, needed=True)
    return messages + _turn(_text(row, args.source_field, needed=True), target)


FORMATS = {"alpaca": from_alpaca, "translation": from_translation}


def detect(row: Any, args: argparse.Namespace) -> str:
    """The format of a first row.

    Raises:
        BadRow: it is none of those known.
    """
    if args.source_field:
        return "translation"
    if isinstance(row, dict) and "instruction" in row:
        return "alpaca"
    raise BadRow("unknown format: alpaca rows have 'instruction'; for translation pairs name --source-field.")


def dump_row(messages: list[Message]) -> str:
    """One row, spaced as in the published sample: `{ "messages": [ {...}, ... ],\\n"prompt": [ ... ] }`."""

    def dump(part: list[Message]) -> str:
        cells = (", ".join(f'"{k}": {json.dumps(v, ensure_ascii=False)}' for k, v in m.items()) for m in part)
        return "[ " + ", ".join(f"{{ {cell} }}" for cell in cells) + " ]"

    return f'{{ "messages": {dump(messages)},\n"prompt": {dump(messages[:-1])} }}'


def convert(args: argparse.Namespace) -> tuple[int, int]:
    """Writes the output aside, then under its name. Returns the rows and, of these, the ones without an answer.

    Raises:
        BadRow: naming file, row and reason. Nothing is left behind.
    """
    temporary = args.output.with_name(f".{args.output.name}.{os.getpid()}.partial")
    count = empty = 0
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as out:
            for path in args.inputs:
                for place, row in read_rows(path):
                    try:
                        if not isinstance(row, dict):
                            raise BadRow(f"must be an object, not {type(row).__name__}.")
                        args.format = args.format or detect(row, args)
                        messages = FORMATS[args.format](row, args)
                    except BadRow as error:
                        raise BadRow(f"{place}: {error}") from None
                    if args.drop_answers:
                        messages[-1]["content"] = ""
                    out.write(("[ " if count == 0 else ",\n") + dump_row(messages))
                    count += 1
                    empty += not messages[-1]["content"].strip()
            if count == 0:
                raise BadRow(f"{', '.join(map(str, args.inputs))}: no rows.")
            out.write(" ]\n")
        os.replace(temporary, args.output)
    finally:
        temporary.unlink(missing_ok=True)
    return count, empty


def main() -> None:
    parser = argparse.ArgumentParser(prog="convert_data.py", description=__doc__.split("\n")[0])
    parser.add_argument("inputs", nargs="+", type=Path, metavar="IN", help="JSON array or JSON lines")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="the JSON file to write")
    parser.add_argument("--from", dest="format", choices=FORMATS, help="format of the input (default: detected)")
    parser.add_argument("--source-field", help="translation pairs: the column to translate")
    parser.add_argument("--target-field", help="translation pairs: the column with the translation")
    parser.add_argument("--system", help="system prompt for rows that have none")
    parser.add_argument("--drop-answers", action="store_true", help="write empty assistant answers")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args()
    if args.format == "translation" and not args.source_field:
        parser.error("--from translation needs --source-field.")
    if args.source_field and not (args.target_field or args.drop_answers):
        parser.error("--source-field needs --target-field, or --drop-answers.")
    if args.output.exists() and not args.overwrite:
        parser.error(f"{args.output} exists; --overwrite replaces it.")
    if missing := [str(path) for path in args.inputs if not path.is_file()]:
        parser.error(f"no such file: {', '.join(missing)}")
    try:
        count, empty = convert(args)
    except BadRow as error:
        print(f"convert_data.py: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{args.output}: {count} rows ({args.format}), {empty} with an empty answer.")


if __name__ == "__main__":
    main()
