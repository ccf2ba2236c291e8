"""`write_report`: from the objects of a study to one HTML file."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmbrain._validation import check_option
from llmbrain.page.report import Report
from llmbrain.reporting import sections as parts
from llmbrain.reporting.comparison import comparison_report
from llmbrain.reporting.effects import labels_of
from llmbrain.reporting.pack import blob, codebook, encode, pack_maps
from llmbrain.reporting.study import Study

RUN_TOKENS, ALL_TOKENS = 2048, 16_384  # how much text the page carries; the tables use all of it


def build_report(
    *,
    title: str,
    scans: Sequence[Any] | None = None,
    ica: Any = None,
    networks: Any = None,
    plan: Any = None,
    dense: Mapping[str, Any] | None = None,
    pruned: Mapping[str, Any] | None = None,
    abilities: pd.DataFrame | None = None,
    lesions: Any = None,
    stability: Any = None,
    connectivity: Any = None,
    comparison: Mapping[str, Any] | None = None,
    warnings: Sequence[Any] = (),
    provenance: Any = None,
) -> Report:
    """Make a report of whatever there is; every part may be missing, and says so.

    Parameters
    ----------
    title : str
    scans : list of Scan, optional
        In the order of the time courses.
    ica : GroupICA, optional
        ``.mixing_``, a list of ``(n_tokens, n_networks)``, gives the time courses where the networks have none.
    networks : FunctionalNetworks, optional
    plan : PruningPlan, optional
    dense, pruned : mappings, optional
        perplexity, parameters, mlp_neurons, tokens_per_second and more, before and after.
    abilities : DataFrame, optional
        A row an ability, a column a model.
    lesions : LesionTable or DataFrame, optional
        See `llmbrain.plotting.long_lesions`.
    stability : Stability, or array ``(n_networks,)``, optional
        What `ica_stability` returned; its centrotypes are matched to the networks.
    connectivity : square array or DataFrame, optional
    comparison : mapping of names to DataFrames, Figures or text, optional
    warnings : sequence of str or warnings, optional
    provenance : mapping, optional

    Returns
    -------
    Report
    """
    study = Study(
        title, scans, ica, networks, plan, dense, pruned, abilities, lesions, stability, connectivity, comparison,
        list(warnings), provenance,
    )  # fmt: skip
    rows = parts.network_rows(study)
    report = Report(title, subtitle=_subtitle(study))
    report.viewer, report.blobs = viewer_data(study)
    report.add(parts.summary(study, rows)).add(parts.explorer(study))
    for row in rows:
        report.add(parts.network_page(row, study))
    for section in (parts.relations(study), parts.pruning(study), parts.comparison(study)):
        if section is not None:
            report.add(section)
    return (
        report.add(parts.methods_section(study)).add(parts.warnings_section(study)).add(parts.provenance_section(study))
    )


def report_of(obj: Any, *, title: str | None = None, **contents: Any) -> Report:
    """The report of one object; what ``obj.generate_report()`` gives.

    Parameters
    ----------
    obj : GroupICA, FunctionalNetworks, PruningPlan, LesionTable, Coupling or Comparison
        Fitted.
    title : str, optional
        Default: the kind of object.
    **contents
        What else belongs in it, as for `build_report`.

    Raises
    ------
    InputError
        If there is no report of such an object, or it is not fitted.
    """
    kind = type(obj).__name__
    if kind == "Comparison":
        return comparison_report(obj, title=title or "llmbrain: Comparison", **contents)
    if kind == "GroupICA":
        from llmbrain.networks import FunctionalNetworks

        own: dict[str, Any] = {"ica": obj, "networks": FunctionalNetworks.from_ica(obj)}
    else:
        parts_of = {"FunctionalNetworks": "networks", "PruningPlan": "plan", "LesionTable": "lesions"}
        if kind == "Coupling":
            own = {"comparison": {"coupling": obj}}
        else:
            own = {parts_of[check_option("type of object", kind, parts_of)]: obj}
    return build_report(title=title or f"llmbrain: {kind}", **{**own, **contents})


def write_report(path: str | os.PathLike[str], *, title: str, **contents: Any) -> Path:
    """Write the report of `build_report` (same parameters) to `path`: one self-contained HTML file."""
    return build_report(title=title, **contents).save(path)


def _subtitle(study: Study) -> str:
    model = next((str(scan.model_id) for scan in study.scans or [] if getattr(scan, "model_id", None)), "")
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return " · ".join(piece for piece in (model, made) if piece)


def viewer_data(study: Study) -> tuple[dict[str, Any], dict[str, str]]:
    """What the viewer in the page reads: a record, and blobs by name (``map-0``, ``course-0``)."""
    record: dict[str, Any] = {"source": "page", "names": study.names, "runs": [], "space": None}
    blobs: dict[str, str] = {}
    if study.space is not None:
        packed = pack_maps(study.networks.maps)
        record["space"] = {"widths": list(study.space.widths), "grid": list(study.space.grid)}
        record["maps"] = {"book": packed["book"], "step": packed["step"]}
        record["cutoffs"] = cutoffs(study)
        if packed["step"] > 0.5:
            study.notes.append("the model is so large that the page holds only map values of |z| of 2 or more")
        record["profiles"] = None if study.profiles is None else study.profiles.tolist()
        blobs.update({f"map-{k}": text for k, text in enumerate(packed["blobs"])})
    if study.courses is not None and study.runs:
        book = codebook(max(float(np.abs(c).max(initial=0)) for c in study.courses), 0.05)
        record["courses"] = {"book": [round(float(v), 4) for v in book]}
        left = ALL_TOKENS
        for i, (scan, course, text) in enumerate(zip(study.runs, study.courses, study.texts)):
            n = min(len(course), RUN_TOKENS, left)
            if n <= 0:
                break
            left -= n
            name = str(getattr(scan, "name", "") or f"run {i}")
            record["runs"].append(
                {"name": name, "n": n, "of": len(course), "tokens": text[:n], "conditions": condition_spans(scan, 0, n)}
            )
            blobs[f"course-{i}"] = blob(encode(course[:n].T, book))
        hidden = len(study.runs) - len(record["runs"])
        cut = sum(run["n"] < run["of"] for run in record["runs"])
        if hidden or cut:
            study.notes.append(
                f"the viewer shows the first {RUN_TOKENS:,} tokens of a run and {ALL_TOKENS:,} in all: {cut} runs are "
                f"cut, {hidden} not shown; all tables use all tokens"
            )
    return record, blobs


def cutoffs(study: Study) -> list[list[float | None]]:
    """(low, high) of each network; from its mask where it does not say."""
    known = getattr(study.networks, "cutoffs", None)
    if known is None:
        threshold = getattr(study.networks, "threshold", None)
        high = float(threshold) if isinstance(threshold, (int, float)) else None
        return [[None if high is None else -high, high]] * study.n_networks
    return [[float(v) if np.isfinite(v) else None for v in pair] for pair in np.asarray(known)]


def condition_spans(scan: Any, start: int, stop: int) -> list[list[Any]]:
    """Stretches of equal condition, counted from `start`: ``[first token, last token + 1, condition]``."""
    spans: list[list[Any]] = []
    for i, label in enumerate(labels_of(scan)[start:stop]):
        if label is None:
            continue
        if spans and spans[-1][1] == i and spans[-1][2] == label:
            spans[-1][1] = i + 1
        else:
            spans.append([i, i + 1, label])
    return spans
