"""One self-contained HTML report of a study or of one object, and a local viewer for studies too large for one file.

Public: `report` (of one object), `build_report`, `write_report` (of whatever there is), `comparison_report`,
`comparison_figures`.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "comparison": ["comparison_figures", "comparison_report"],
        "dispatch": ["report"],
        "write": ["build_report", "write_report"],
    },
)
