"""Writes the report of one run, or of several side by side.

    gkd report runs/mixed
    gkd report runs/off_policy runs/on_policy -o reports/lambda

It is `report.md` and `report.html`, which needs no other file.
"""

from gkd.config.commands import report_flags
from gkd.io.errors import one_line_errors, refusals
from gkd.report.write import write_report


def main(argv: list[str] | None = None, prog: str = "gkd report") -> None:
    args = report_flags(argv, __doc__, prog)
    with one_line_errors(prog, "The same command writes the report anew."):
        with refusals(prog):
            path = write_report(args.runs, args.output_dir or args.runs[0])
        print(f"{path} and {path.with_suffix('.md').name}")
