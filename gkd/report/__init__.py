"""The report of a run, or of several side by side: `report.md` and a self-contained `report.html`."""

from gkd.report.write import write_report

__all__ = ["write_report"]
