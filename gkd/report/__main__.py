"""Writes the report of one run, or of several runs side by side.

python -m gkd.report runs/mixed
python -m gkd.report runs/off_policy runs/on_policy -o reports/lambda
"""

import sys

from gkd.parsers import report_flags
from gkd.start import quiet_imports

if __name__ == "__main__":  # help and wrong flags are answered before the imports below, which take seconds
    quiet_imports("gkd.report")
    report_flags(sys.argv[1:], __doc__)

from gkd.command import one_line_errors, refusals
from gkd.report.write import write_report


@one_line_errors("gkd.report", "The same command writes the report anew.")
def main(argv: list[str] | None = None) -> None:
    args = report_flags(argv, __doc__)
    with refusals("gkd.report"):
        path = write_report(args.runs, args.output_dir or args.runs[0])
    print(f"{path} and {path.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
