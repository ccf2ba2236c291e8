"""One self-contained HTML report of a study, and a local viewer for studies too large for one file."""

from llmbrain.reporting._comparison import comparison_figures, comparison_report
from llmbrain.reporting._report import Report, Section
from llmbrain.reporting._write import build_report, report_of, write_report

__all__ = ["Report", "Section", "build_report", "comparison_figures", "comparison_report", "report_of", "write_report"]
