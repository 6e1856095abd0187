"""Loads files, folders and hub ids as datasets, and checks every row (see gkd.data.rows) before a model loads."""

import csv
import json
import mmap
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, LargeList, List, Value, load_dataset, load_from_disk

from gkd.data.delimited import checked_file
from gkd.data.json_rows import JsonStream, problem_of
from gkd.data.rows import DataError, encoded, has_answer, row_problem
from gkd.io.paths import read_text
from gkd.io.terminal import visible

_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}

_NULL = re.compile(rb"null\s*(?:[],\r\n]|\Z)")
_ESCAPE = re.compile(rb"\\(?:\\|u[dD](?:[89abAB]..(?:\\u[dD][c-fC-F]..)?|[c-fC-F]..))")
_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_CHUNK = 1 << 20  # bytes
_DEPTH = 200  # levels of brackets; readable rows may go deeper
# Text that `datasets` reads as a time, where all of a column's first part is such: "2021-03-05", "2021-03-05T10:00:00Z".
_DATE = re.compile(rb'"\d{4}-\d\d-\d\d(?:[ T][\d:]{2,8}(?:Z|[+-][\d:]{2,5})?)?"')
_PART = 10 << 20  # bytes, of which `datasets` finds the types of columns
_NEEDED = {"messages", "prompt", "completion", "text", "tools", "chat_template_kwargs", "teacher_prompt", "teacher"}


def load_rows(name: str, split: str, config: str | None = None, streaming: bool = False) -> Dataset | IterableDataset:
    """Loads one split of a local file, a folder or a hub dataset. Raises DataError, with the line if there is one."""
    path = Path(name)
    if path.is_file():
        if path.suffix not in _LOADERS:
            raise DataError(f"{name}: unknown file type {path.suffix!r}; use one of {', '.join(_LOADERS)}.")
        if split != "train":
            raise DataError(f"{name} is a single file, so it has a train split only, not {split!r}. Use a folder.")
        options = {}
        try:
            if _LOADERS[path.suffix] == "csv":  # cells are text: "2" is an answer, not a number
                header, form = checked_file(path)
                features = Features(dict.fromkeys(header, Value("string")))
                options = {"features": features, "keep_default_na": False, **form}
                if form["quoting"] == csv.QUOTE_NONE:
                    print(f"{visible(name)}: its quotes are read as text; none enclose cells.", file=sys.stderr)
            elif _LOADERS[path.suffix] == "json":
                _check_json(path)
            data = load_dataset(_LOADERS[path.suffix], data_files=name, split="train", streaming=streaming, **options)
            if _LOADERS[path.suffix] == "json" and (_times(data.features) or _may_read_times(path, data.features)):
                data = _read_as_text(path, data.features, streaming)
        except DataError:
            raise
        except Exception as error:
            raise DataError(_explain(path) or f"{name} can't be read: {error}") from error
        data = only_text(data, name)
        if not streaming and len(data) == 0:
            raise DataError(f"{name} holds no rows.")
        return data
    if not path.exists() and (path.suffix in _LOADERS or name.startswith((".", "/", "~"))):
        raise DataError(f"{name}: no such file or folder.")
    files = [
        file for file in sorted(path.rglob("*")) if file.suffix in _LOADERS and file.is_file()
    ]  # none of a hub id
    saved = any((path / info).is_file() for info in ("state.json", "dataset_dict.json"))
    if not saved and all(_LOADERS[file.suffix] == "json" for file in files):  # else they may hold something else
        for file in files:
            _check_json(file)
    try:
        if saved:
            loaded = load_from_disk(name)
            loaded = loaded if isinstance(loaded, Dataset) else loaded[split]
        else:
            loaded = load_dataset(name, name=config, split=split, streaming=streaming)
    except Exception as error:
        for file in files:
            if file.suffix != ".parquet":
                read_text(file)  # says which one is not UTF-8
        where = "folder" if path.is_dir() else "hub dataset (there is no local file or folder of this name)"
        raise DataError(f"{name}: can't load split {split!r} of this {where}: {error}") from error
    if times := sorted(_times(loaded.features) & _NEEDED):
        raise DataError(
            f"{name}: the text in column {times[0]!r} looks like dates, and was read as such. Give a file of JSON lines by its "
            "name, which is read as text."
        )
    return only_text(loaded, name)


def _times(features: Features | None) -> set[str]:
    """The columns with a part that is no text, but a time."""
    return {name for name, feature in (features or {}).items() if _text_for_times(feature) != feature}


def _text_for_times(feature: Any) -> Any:
    """A feature with text where it has times."""
    if isinstance(feature, dict):
        return {name: _text_for_times(part) for name, part in feature.items()}
    if isinstance(feature, list):
        return [_text_for_times(part) for part in feature]
    if isinstance(feature, List | LargeList):
        return replace(feature, feature=_text_for_times(feature.feature))
    return Value("string") if isinstance(feature, Value) and feature.dtype.startswith("timestamp") else feature


def _may_read_times(path: Path, features: Features | None) -> bool:
    """Whether a part of a file whose types are not known may be read as times, and become another text than there."""
    if features is not None and path.stat().st_size <= _PART:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return _DATE.search(text) is not None


def _read_as_text(path: Path, features: Features | None, streaming: bool) -> Dataset | IterableDataset:
    """JSON whose dates stay the text that they are."""
    features = None if features is None else Features(_text_for_times(dict(features)))
    kind, about = (IterableDataset if streaming else Dataset), path.stat()
    names = features or {name: None for row in _rows_in(str(path), ()) for name in row}  # all rows have the same
    given: dict[str, Any] = {"path": str(path.absolute()), "names": tuple(names)}  # a list would be that of shards
    given["changed"] = about.st_mtime_ns, about.st_size  # since what is cached
    return kind.from_generator(_rows_in, features=features, gen_kwargs=given)


def _rows_in(path: str, names: tuple[str, ...], changed: Any = None) -> Iterator[dict[str, Any]]:
    for row, _ in _streamed(Path(path)):
        yield dict.fromkeys(names) | row


def _streamed(path: Path) -> Iterator[tuple[Any, str | None]]:
    """The rows of a JSON file that is not empty, an array or one after another, each with its problem."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        array = _ARRAY.match(text) is not None
    with path.open(encoding="utf-8-sig") as source:
        yield from JsonStream(source, array)


def only_text(data: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """Drops columns of images, audio, video and the like: a row of such a column may name any file or address, which
    `datasets` opens when the row is read. Raises DataError if a column that gkd needs is not text."""
    media = {column for column, feature in (data.features or {}).items() if _names_files(feature)}
    if not media:
        return data
    if needed := sorted(media & _NEEDED or (media if media == set(data.features) else ())):
        raise DataError(f"{name}: column {needed[0]!r} holds images, sound or other files; gkd reads text only.")
    print(visible(f"warning: {name}: left out, being no text: {', '.join(sorted(media))}."), file=sys.stderr)
    if isinstance(data, Dataset):
        return data.remove_columns(sorted(media))
    # Otherwise the columns would be decoded before they are removed. Columns of JSON are decoded afterwards.
    return data.decode(False).remove_columns(sorted(media)).decode(True)


def _names_files(feature: Any) -> bool:
    """Whether a feature, or a part of it, is decoded from a file when a row is read."""
    if isinstance(feature, dict):
        return any(map(_names_files, feature.values()))
    if isinstance(feature, list | tuple):
        return any(map(_names_files, feature))
    if hasattr(feature, "decode_example"):
        return type(feature).__name__ != "Json"  # parsed from its own text
    return _names_files(getattr(feature, "feature", None) or ())


def held_out_source(name: str, eval_name: str | None, test_split: str) -> tuple[str, str]:
    """Name and split of the held-out rows: from a separate dataset, or the test split of the training data."""
    if eval_name is None:
        return name, test_split
    return eval_name, "train" if Path(eval_name).is_file() else test_split


def _is_suspicious(text: bytes | mmap.mmap) -> bool:
    """Whether JSON may hold null in place of a row, half of a surrogate pair, or deeply nested brackets."""
    for match in _NULL.finditer(text):
        before = text[max(0, match.start() - 99) : match.start()].rstrip(b" \t\r")[-1:]
        if before in (b"", b"[", b",", b"\n", b"\xbf"):  # behind a byte order mark, too
            return True
    if any(len(match[0]) == 6 for match in _ESCAPE.finditer(text)):
        return True
    depth = lowest = 0  # counted from the lowest depth so far, since text may hold brackets that close nothing
    for start in range(0, len(text), _CHUNK):
        brackets = np.frombuffer(text[start : start + _CHUNK].translate(None, _NO_BRACKETS), dtype=np.uint8)
        if len(brackets):
            depths = depth + np.cumsum(np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1))
            lows = np.minimum.accumulate(np.minimum(depths, lowest))
            if (depths - lows).max() > _DEPTH:
                return True
            depth, lowest = depths[-1], lows[-1]
    return False


def _check_json(path: Path) -> None:
    """Refuses JSON that crashes `datasets` (null as a row, thousands of brackets), or that it reads as other text
    (half of a surrogate pair), by a DataError that names the row. Only suspicious files are parsed, and few are."""
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        if not _is_suspicious(text):
            return
    try:
        for index, (row, problem) in enumerate(_streamed(path)):
            if not problem and not isinstance(row, dict):
                problem = row_problem(row)
            try:
                encoded("" if problem else json.dumps(row, ensure_ascii=False))
            except DataError as error:
                problem = str(error)
            if problem:
                raise DataError(f"{path}, row {index}: {problem}")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(_explain(path) or f"{path} can't be read: {error}") from None


def _explain(path: Path) -> str | None:
    """The line or row that makes a JSON file unreadable, and why; None if this reader finds nothing wrong."""
    try:
        text = read_text(path)
    except ValueError as error:
        return str(error)
    if path.suffix not in (".json", ".jsonl"):
        return None
    array = text.lstrip().startswith("[")
    rows = []
    for number, part in enumerate([text] if array else text.split("\n"), 1):
        try:
            if part.strip():
                rows += json.loads(part) if array else [json.loads(part)]
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}" if array else f"line {number}"
            return f"{path}, {where}: broken JSON: {error.msg}."
        except RecursionError as error:
            return f"{path}{'' if array else f', line {number}'}: {problem_of(error, part)}"
    if not rows:
        return f"{path} holds no rows."
    for index, row in enumerate(rows):
        if problem := row_problem(row):
            return f"{path}, row {index}: {problem}"
    return f"{path}: its rows have the same columns with different types; write each column in one form."


def check_rows(data: Dataset | IterableDataset, name: str, needs_answers: bool) -> None:
    """Checks every row against the schema, and that it has an answer if the run needs it (λ < 1 and no seq_kd).

    Raises:
        DataError: naming the first bad row; or how many rows have no answer although the run needs them.
    """
    if isinstance(data, IterableDataset):  # a stream is checked row by row while it is tokenized
        return
    without = []
    for index, row in enumerate(data):
        if problem := row_problem(row):
            raise DataError(f"{name}, row {index}: {problem}")
        if not has_answer(row):
            without.append(index)
    if needs_answers and without:
        raise DataError(
            f"{name}: {len(without)} of {len(data)} rows have no answer (the first is row {without[0]}), so there is "
            "nothing to train on when the text comes from the dataset. Let the teacher write it with --seq_kd True, "
            "train on the student's own text only with --lmbda 1, or fill in or remove these rows."
        )


def token_lengths(encoded: Dataset) -> dict[str, np.ndarray]:
    """Per encoded row: tokens in `prompt` and `answer`, and whether `prompt_cut` and `answer_cut`; each (N,).

    `teacher_prompt` too, where rows have one.
    """
    table = encoded.with_format("arrow")[:]  # memory-mapped: no token becomes a Python object
    prompt, whole = (pc.list_value_length(table[name]).to_numpy() for name in ("prompt_ids", "input_ids"))
    cut = {name: table[name].to_numpy() for name in ("prompt_cut", "answer_cut")}
    lengths = {"prompt": prompt, "answer": whole - prompt, **cut}
    if "teacher_prompt_ids" in encoded.features:
        lengths["teacher_prompt"] = pc.list_value_length(table["teacher_prompt_ids"]).to_numpy()
    return lengths


def summarize_rows(name: str, encoded: Dataset | IterableDataset) -> dict[str, Any]:
    """A summary of the data for a run's record: name, rows, how many have an answer, tokens (median and longest)."""
    if isinstance(encoded, IterableDataset):
        return {"name": name}
    columns = token_lengths(encoded)
    answers = columns["answer"][columns["answer"] > 0]
    summary: dict[str, Any] = {"name": name, "rows": len(encoded), "answered": len(answers)}
    for part, lengths in (("prompt", columns["prompt"]), ("answer", answers)):
        if len(lengths):
            summary[f"{part}_tokens"] = {"median": int(np.median(lengths)), "longest": int(lengths.max())}
        summary[f"{part}s_cut"] = int(columns[f"{part}_cut"].sum())
    return summary
