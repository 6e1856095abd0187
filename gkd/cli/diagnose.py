r"""Tells in minutes whether on-policy training will pay, and with which flags, before a training takes hours.

    gkd diagnose STUDENT TEACHER data/prompts_heldout.json

With a verifier of answers, which tells most:

    gkd diagnose STUDENT TEACHER rows.jsonl --metrics math_verify --max_rows 200 --max_new_tokens 400

Both models answer the prompts. Then it measures how far the student is from the teacher on given text and on its own, by
position in the answer; where the student's first errors are; and how many failed answers the teacher still brings to a
right end when it continues behind the first error. Advice comes with the figure behind it. OUTPUT_DIR gets diagnosis.json,
rescues.jsonl with the continued answers, and the evaluation of both models, which the same command reuses.
"""

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from gkd.cli.evaluate import begin
from gkd.config.diagnosing import DiagnoseArguments, make_parser
from gkd.evaluation.advice import advice
from gkd.evaluation.diagnosis import Diagnosis, by_position, errors, record_lengths, share_rescued
from gkd.io.console import Console, print_table, printable
from gkd.io.errors import one_line_errors, refusals
from gkd.io.files import write_json, write_whole
from gkd.report.tables import print_results
from gkd.runs.results import comparable, read_results


def parse(argv: list[str], prog: str = "gkd diagnose") -> DiagnoseArguments:
    """Exits with code 2 and one line for an unknown flag or a bad value."""
    first = "--model_name_or_path", "--teacher_model_name_or_path", "--dataset_name"
    return make_parser(prog=prog, description=__doc__).parse_one(argv, first)


def main(argv: list[str] | None = None, prog: str = "gkd diagnose") -> None:
    with one_line_errors(prog, "Answers that are written are kept: the same command goes on."):
        diagnose(parse(sys.argv[1:] if argv is None else argv, prog), prog)


def diagnose(args: DiagnoseArguments, prog: str) -> dict[str, Any]:
    """Measures, prints and writes the diagnosis."""
    refusing = partial(refusals, prog)
    models, evaluation, teacher = begin(args, refusing)
    (entry,) = models.students
    with refusing():
        student = models.student(entry, evaluation.accelerator)
    evaluation.student(student)
    room = args.max_new_tokens, args.max_length
    measured = Diagnosis(evaluation, teacher, student, models.teacher_writer, *room)
    statistics = measured.statistics()
    metric = measured.passes()
    rescues = [] if metric is None else measured.rescues(metric, statistics)
    results = comparable(read_results(args.output_dir), evaluation.data)
    sides = {"student": (entry.label, measured.completions), "teacher": ("teacher", measured.answers)}
    figures = {result["model"]: result["metrics"] for result in results}
    diagnosis = {
        "models": [args.model_name_or_path, args.teacher_model_name_or_path or evaluation.reader.name],
        "data": evaluation.data,
        "rows": len(evaluation.rows),
        "temperature": args.eval_temperature,
        "max_new_tokens": args.max_new_tokens,
        "metric": metric,
        "positions": {text: by_position(statistics[text]) for text in ("given", "own")},
        "errors": errors(statistics["own"], statistics["teacher"]),
        "rescue": None if metric is None else share_rescued(rescues),
        **{
            side: {"figures": figures[label], "lengths": record_lengths(records)}
            for side, (label, records) in sides.items()
        },
    }
    diagnosis["advice"] = [piece._asdict() for piece in advice(diagnosis)]
    write_json(Path(args.output_dir, "diagnosis.json"), diagnosis)
    cases = (asdict(rescue) | {"answer": measured.completions[rescue.row]["text"]} for rescue in rescues)
    lines = "".join(json.dumps(case, ensure_ascii=False) + "\n" for case in cases)
    write_whole(Path(args.output_dir, "rescues.jsonl"), lines)
    print_results(results, f"{evaluation.data}, {len(evaluation.rows)} rows")
    show(diagnosis)
    print(f"Figures and continued answers: {args.output_dir}")
    return diagnosis


def show(diagnosis: dict[str, Any]) -> None:
    """Prints a diagnosis: by position, errors and rescues, and the advice."""
    table = Table(title="By position in the answer", caption="Student against teacher; KL in nats per token.")
    columns = {"forward_kl": "forward KL", "total_variation": "accepted as a draft", "agreement": "same first token"}
    columns["top5_agreement"] = "same first five"
    for title in ("tokens", "text", *columns.values()):
        table.add_column(title, justify="left" if title == "text" else "right")
    for text, title in (("given", "given"), ("own", "its own")):
        for span in diagnosis["positions"][text]:
            shares = [1 - span["total_variation"], span["agreement"], span["top5_agreement"]]
            until = f" to {span['to']}" if span["to"] else " on"
            cells = f"{span['from']}{until}", title, f"{span['forward_kl']:.3f}", *(f"{s:.0%}" for s in shares)
            table.add_row(*cells)
        table.add_section()
    print_table(table)
    found, rescue = diagnosis["errors"], diagnosis["rescue"]
    table = Table(title="The student's first errors, by the teacher's surprise above its entropy", show_header=False)
    table.add_row(f"answers with a surprise of {found['level']:.1f} nats or more", _interval(found["answers"]))
    if found["position"] is not None:
        surprise = (found[f"surprise_{where}"] for where in ("before", "at", "behind"))
        shown = " → ".join("?" if nats is None else f"{nats:.2f}" for nats in surprise)
        table.add_row("token of the first one, median", f"{found['position']:.0f}")
        table.add_row("before it → at it → behind it", f"{shown} nats")
        table.add_row("it falls back behind", _interval(found["falls_back"]))
    if rescue is not None:
        table.add_row(escape(f"answers that fail by {diagnosis['metric']}"), f"{rescue['failed']}")
        if rescue["failed"]:
            table.add_row("the teacher rescues from behind the error", _interval(rescue | {"value": rescue["rate"]}))
            table.add_row("from in front of it", _interval(rescue["before"]))
    print_table(table)
    console = Console(soft_wrap=True)
    console.print("[bold]Advice[/]")
    for piece in diagnosis["advice"]:
        console.print(printable(f"  * {piece['say']}.\n    {piece['because'][:1].upper()}{piece['because'][1:]}."))


def _interval(share: dict[str, float]) -> str:
    if share["value"] is None:
        return "none"
    return f"{share['value']:.0%} [{share['low']:.0%}, {share['high']:.0%}]"
