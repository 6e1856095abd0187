"""Writes the report of one run, or of several runs side by side.

python -m gkd.cli.report runs/mixed
python -m gkd.cli.report runs/off_policy runs/on_policy -o reports/lambda
"""

import sys

from gkd.cli.start import quiet_imports
from gkd.config.commands import report_flags

if __name__ == "__main__":  # help and wrong flags are answered before the imports below, which take seconds
    quiet_imports("gkd.cli.report")
    report_flags(sys.argv[1:], __doc__)

from gkd.io.errors import one_line_errors, refusals
from gkd.report.write import write_report


@one_line_errors("gkd.cli.report", "The same command writes the report anew.")
def main(argv: list[str] | None = None) -> None:
    args = report_flags(argv, __doc__)
    with refusals("gkd.cli.report"):
        path = write_report(args.runs, args.output_dir or args.runs[0])
    print(f"{path} and {path.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
