"""What a report page is made of: `Report`, `Section` and text. Knows no study."""

from llmbrain.page.report import Report, Section

__all__ = ["Report", "Section"]
