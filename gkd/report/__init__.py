"""The report of a run, or of several side by side: `report.md` and a self-contained `report.html`."""

from typing import Any

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    """`write_report` imports what draws and counts, which `gkd report --help` has no need of."""
    if name == "write_report":
        from gkd.report.write import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
