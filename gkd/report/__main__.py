"""Writes the report of one run, or of several runs side by side.

python -m gkd.report runs/mixed
python -m gkd.report runs/off_policy runs/on_policy -o reports/lambda
"""

import sys

from gkd.parsers import report_flags

if __name__ == "__main__":  # help and wrong flags are answered before the imports below, which take seconds
    report_flags(sys.argv[1:], __doc__)

from gkd.report.write import write_report


def main(argv: list[str] | None = None) -> None:
    args = report_flags(argv, __doc__)
    try:
        path = write_report(args.runs, args.output_dir or args.runs[0])
    except (ValueError, OSError) as error:
        sys.exit(f"gkd.report: {error}")
    print(f"{path} and {path.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
