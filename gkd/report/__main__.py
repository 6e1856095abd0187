"""Writes the report of one run, or of several runs side by side.

python -m gkd.report runs/mixed
python -m gkd.report runs/off_policy runs/on_policy -o reports/lambda
"""

import argparse
import sys

from gkd.command import one_line_errors, quiet_imports

if __name__ == "__main__":
    quiet_imports("gkd.report")

from gkd.report.write import write_report
from gkd.terminal import visible


@one_line_errors("gkd.report", "The same command writes the report anew.")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gkd.report", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a train_gkd.py run or of an eval_gkd.py one")
    parser.add_argument(
        "-o", "--output_dir", help="where report.md and report.html go (default: a single run's folder)"
    )
    args = parser.parse_args(argv)
    if args.output_dir is None and len(args.runs) > 1:
        parser.error("several runs: say where their report goes, by -o DIR.")
    try:
        path = write_report(args.runs, args.output_dir or args.runs[0])
    except ValueError as error:
        sys.exit(visible(f"gkd.report: {error}"))
    print(f"{path} and {path.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
