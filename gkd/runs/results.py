"""What evaluations leave in a folder: a record of each row, and `evaluation/results.json`."""

import json
import logging
import os
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

from gkd.io.errors import first_line
from gkd.io.files import is_plain_name, put_aside, write_json, write_whole
from gkd.metrics.names import WHERE

logger = logging.getLogger(__name__)
FOLDER = "evaluation"
Record = dict[str, Any]  # what an evaluation keeps of one row, see gkd.evaluation.evaluator


def read_results(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The results in a run's (or an evaluation's) folder, [] if there are none.

    A damaged file is reported, renamed, and rewritten with the results in it that are intact.
    """
    path = Path(folder, FOLDER, "results.json")
    if not path.is_file():
        return []
    text = path.read_bytes().decode("utf-8", "replace")
    try:
        results = json.loads(text)["results"]
        if not all(map(_is_result, results)):
            raise ValueError("an entry is not a result")
        return results
    except (ValueError, TypeError, KeyError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else first_line(error)
    results = _whole_results(text)
    put_aside(path, problem, f"Whole results, which are kept: {len(results)}; eval_gkd.py finds the others again.")
    with suppress(OSError):  # a folder that can only be read
        write_json(path, {"results": results})
    return results


RESULT_FIELDS = {"model", "step", "data", "rows", "beta", "references", "settings", "records", "parameters", "gib"}
RESULT_FIELDS |= {"tokens_per_second", "metrics"}


def _is_result(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() >= RESULT_FIELDS
        and all(isinstance(entry[name], str) for name in ("model", "data", "settings"))
        and isinstance(entry.get("divergence", ""), str)
        and all(type(entry[name]) in (int, float) for name in ("rows", "parameters", "gib", "tokens_per_second"))
        and (entry["step"] is None or type(entry["step"]) is int)
        and _are_figures(entry["metrics"])
        and _are_figures(entry.get("change", {}))
        and _are_parts(entry.get("by_teacher", {}))
    )


def _are_parts(value: Any) -> bool:
    """Whether these are the figures of each teacher's rows."""
    return isinstance(value, dict) and all(
        isinstance(part, dict)
        and type(part.get("rows")) is int
        and _are_figures(part.get("metrics"))
        and _are_figures(part.get("change"))
        for part in value.values()
    )


def _are_figures(value: Any) -> bool:
    return isinstance(value, dict) and all(
        "/" in name
        and name.split("/")[0] in WHERE
        and isinstance(figure, dict)
        and all(type(figure.get(part)) in (int, float) for part in ("value", "low", "high"))
        for name, figure in value.items()
    )


def _whole_results(text: str) -> list[dict[str, Any]]:
    """The intact results in a file that is cut off."""
    results, decode = [], json.JSONDecoder().raw_decode
    start = text.find("{", text.find("[")) if "[" in text else -1
    with suppress(ValueError):
        while start >= 0:
            entry, end = decode(text, start)
            if _is_result(entry):
                results.append(entry)
            start = text.find("{", end)
    return results


def comparable(results: list[dict[str, Any]], data: str) -> list[dict[str, Any]]:
    """Results on this held-out data with the same settings as the newest one: rows, teacher, lengths, divergence."""
    on_data = [result for result in results if result["data"] == data]
    return [result for result in on_data if result["settings"] == on_data[-1]["settings"]]


def read_records(path: str | os.PathLike, repair: bool = False) -> list[Record]:
    """The intact records in a file, in the order of their rows. If a row occurs twice, the last one counts.

    A last line that a killed evaluation has cut off is skipped, as is any other damaged line. `repair` rewrites the file
    without such lines; a damaged file is reported, and kept under another name.
    """
    path = Path(path)
    if not path.is_file():
        return []
    records, damaged = {}, []
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not (isinstance(record, dict) and record.keys() >= RECORD_FIELDS and isinstance(record["row"], int)):
                raise ValueError
            records[record["row"]] = record
        except ValueError:
            damaged.append(number)
    records = [records[row] for row in sorted(records)]
    if repair and (damaged or torn):
        if damaged:
            where = f"line {damaged[0]}" + (f" and {len(damaged) - 1} others" if damaged[1:] else "")
            put_aside(path, where, f"Whole rows, which are kept: {len(records)}; the others are evaluated again.")
        write_records(path, records)
    return records


RECORD_FIELDS = {"row", "prompt", "text", "tokens", "truncated", "repetition", "seconds", "reference", "reference_by"}


def write_records(path: str | os.PathLike, records: list[Record]) -> None:
    """Writes one record per line."""
    write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def records_of(folder: str | os.PathLike, model: str, data: str, settings: str) -> list[Record]:
    """The records of a model that `results.json` lists, in the order of rows; [] if there are none."""
    entries = (e for e in read_results(folder) if (e["model"], e["data"], e["settings"]) == (model, data, settings))
    if (entry := next(entries, None)) is None:
        return []
    path = Path(folder, FOLDER, "rows", str(entry["records"]))
    if not is_plain_name(entry["records"]) or path.is_symlink():
        where = Path(folder, FOLDER, "results.json")
        logger.warning("%s: `records` of %r names no file of evaluation/rows: left out.", where, model)
        return []
    return [record for record in read_records(path) if "scores" in record]  # others are of an unfinished evaluation


def add_result(folder: str | os.PathLike, result: dict[str, Any]) -> None:
    """Adds a result; it replaces an earlier one of the same model on the same data."""
    key = itemgetter("model", "data")
    entries = [*(entry for entry in read_results(folder) if key(entry) != key(result)), result]
    write_json(Path(folder, FOLDER, "results.json"), {"results": entries})
