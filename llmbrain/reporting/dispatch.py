"""`report`: the report of one object, chosen by its class (subclasses included)."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from llmbrain._validation import InputError
from llmbrain.comparison.coupling import Coupling
from llmbrain.comparison.story import Comparison
from llmbrain.decomposition.group_ica import GroupICA
from llmbrain.intervention.table import LesionTable
from llmbrain.networks.functional import FunctionalNetworks
from llmbrain.page.report import Report
from llmbrain.pruning.plan import PruningPlan
from llmbrain.reporting.comparison import comparison_report
from llmbrain.reporting.write import build_report


@singledispatch
def report(obj: object, *, title: str | None = None, **contents: Any) -> Report:
    """The report of one object: it shows in a notebook, and ``.save(path)`` writes one self-contained HTML file.

    Another class gets its report by ``@llmbrain.reporting.report.register``.

    Parameters
    ----------
    obj : GroupICA, FunctionalNetworks, PruningPlan, LesionTable, Coupling or Comparison
        Or a subclass of one of them; a `GroupICA` fitted.
    title : str, optional
        Default: the class of the object.
    **contents
        What else belongs in it, as for `llmbrain.reporting.build_report`; of a `Comparison`, as for
        `llmbrain.reporting.comparison_report`.

    Returns
    -------
    Report

    Raises
    ------
    InputError
        If objects of this class have no report, or the object is not fitted.
    """
    known = ", ".join(sorted(kind.__name__ for kind in report.registry if kind is not object))
    raise InputError(f"obj={type(obj).__name__} has no report: allowed are {known}")


@report.register
def _(obj: GroupICA, *, title: str | None = None, **contents: Any) -> Report:
    own = {"ica": obj, "networks": FunctionalNetworks.from_ica(obj)}
    return build_report(title=title or _name(obj), **{**own, **contents})


@report.register
def _(obj: FunctionalNetworks, *, title: str | None = None, **contents: Any) -> Report:
    return build_report(title=title or _name(obj), networks=obj, **contents)


@report.register
def _(obj: PruningPlan, *, title: str | None = None, **contents: Any) -> Report:
    return build_report(title=title or _name(obj), plan=obj, **contents)


@report.register
def _(obj: LesionTable, *, title: str | None = None, **contents: Any) -> Report:
    return build_report(title=title or _name(obj), lesions=obj, **contents)


@report.register
def _(obj: Coupling, *, title: str | None = None, **contents: Any) -> Report:
    return build_report(title=title or _name(obj), comparison={"coupling": obj}, **contents)


@report.register
def _(obj: Comparison, *, title: str | None = None, **contents: Any) -> Report:
    return comparison_report(obj, title=title or _name(obj), **contents)


def _name(obj: object) -> str:
    return f"llmbrain: {type(obj).__name__}"
