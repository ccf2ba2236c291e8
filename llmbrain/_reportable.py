"""``generate_report()`` for the objects a user holds."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Reportable:
    """Gives a class ``generate_report()``. Reporting lies above all other rooms, so it is looked up when asked."""

    def generate_report(self, **contents: Any) -> Any:
        """A `llmbrain.reporting.Report` of this object: shows in a notebook, ``.save(path)`` writes one HTML file.

        Parameters
        ----------
        **contents
            What else belongs in it: ``title``, ``scans``, ``networks``, ``lesions``, ... as for
            `llmbrain.reporting.build_report`.
        """
        return import_module("llmbrain.reporting").report_of(self, **contents)
