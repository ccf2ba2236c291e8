"""One self-contained HTML report of a study, and a local viewer for studies too large for one file."""

from llmbrain.page.report import Report, Section
from llmbrain.reporting.comparison import comparison_figures, comparison_report
from llmbrain.reporting.write import build_report, report_of, write_report

__all__ = ["Report", "Section", "build_report", "comparison_figures", "comparison_report", "report_of", "write_report"]
