"""`build_report` and `write_report`: from the objects of a study to one HTML file."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from llmbrain.page.report import Report
from llmbrain.page.text import short_name
from llmbrain.reporting import sections as parts
from llmbrain.reporting.contents import Contents
from llmbrain.reporting.effects import labels_of
from llmbrain.reporting.pack import blob, codebook, encode, pack_maps

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Image
    from numpy.typing import ArrayLike

    from llmbrain.decomposition.group_ica import GroupICA
    from llmbrain.decomposition.stability import Stability
    from llmbrain.imaging.atlas import Atlas
    from llmbrain.intervention.table import LesionTable
    from llmbrain.networks.connectivity import Connectivity
    from llmbrain.networks.functional import FunctionalNetworks
    from llmbrain.pruning.forecast import Forecast
    from llmbrain.pruning.plan import PruningPlan
    from llmbrain.scanning.scans import Scan

RUN_TOKENS, ALL_TOKENS = 2048, 16_384  # how much text the page carries; the tables use all of it


def build_report(
    *,
    title: str,
    scans: Sequence[Scan] | None = None,
    ica: GroupICA | None = None,
    networks: FunctionalNetworks | None = None,
    plan: PruningPlan | None = None,
    dense: Mapping[str, Any] | None = None,
    pruned: Mapping[str, Any] | None = None,
    abilities: pd.DataFrame | None = None,
    lesions: LesionTable | pd.DataFrame | None = None,
    stability: Stability | ArrayLike | None = None,
    connectivity: Connectivity | ArrayLike | pd.DataFrame | None = None,
    comparison: Mapping[str, object] | None = None,
    warnings: Sequence[str | Warning] = (),
    provenance: Mapping[str, object] | None = None,
    mask_img: Nifti1Image | str | os.PathLike[str] | None = None,
    atlas: Atlas | tuple[Nifti1Image | str | os.PathLike[str], Sequence[str]] | None = None,
    forecast: Forecast | None = None,
    forgetting: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
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
    connectivity : Connectivity, square array or DataFrame, optional
    comparison : mapping of names to DataFrames, Figures or text, optional
    warnings : sequence of str or warnings, optional
    provenance : mapping, optional
    mask_img : NIfTI image or path, optional
        Of maps of a brain: the mask whose voxels (C order) the maps hold; default the brain mask of `ica`. Networks are
        shown with nilearn, and their peaks with coordinates in millimeters.
    atlas : Atlas or (image, labels), optional
        Of maps of a brain: names the regions of the peaks. Value v is ``labels[v]``, 0 the background.
    forecast : Forecast, optional
        What `plan` will cost (`PruningPlan.forecast`), and did cost where it was measured.
    forgetting : mapping, optional
        Of a cut that forgets: ``"forgetting"`` of the model's record, with the relearning attack.
    summary : mapping, optional
        ``Study.summary``: its ``held_out``, ``sample``, ``cut`` and ``gave_up`` are shown.

    Returns
    -------
    Report
    """
    held = Contents(
        title, scans, ica, networks, plan, dense, pruned, abilities, lesions, stability, connectivity, comparison,
        list(warnings), provenance, mask_img, atlas, forecast, forgetting, summary,
    )  # fmt: skip
    rows = parts.network_rows(held)
    report = Report(title, subtitle=_subtitle(held))
    report.viewer, report.blobs = viewer_data(held)
    report.add(parts.summary(held, rows)).add(parts.explorer(held))
    for row in rows:
        report.add(parts.network_page(row, held))
    for section in (parts.relations(held), parts.pruning(held), parts.comparison(held)):
        if section is not None:
            report.add(section)
    return report.add(parts.methods_section(held)).add(parts.warnings_section(held)).add(parts.provenance_section(held))


def write_report(path: str | os.PathLike[str], *, title: str, **contents: Any) -> Path:
    """Write the report of `build_report` (same parameters) to `path`: one self-contained HTML file."""
    return build_report(title=title, **contents).save(path)


def _subtitle(held: Contents) -> str:
    model = next((short_name(str(scan.model_id)) for scan in held.scans or [] if getattr(scan, "model_id", None)), "")
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return " · ".join(piece for piece in (model, made) if piece)


def viewer_data(held: Contents) -> tuple[dict[str, Any], dict[str, str]]:
    """What the viewer in the page reads: a record, and blobs by name (``map-0``, ``course-0``)."""
    record: dict[str, Any] = {"source": "page", "names": held.names, "runs": [], "space": None}
    blobs: dict[str, str] = {}
    if held.space is not None:
        packed = pack_maps(held.networks.maps)
        record["space"] = {"widths": list(held.space.widths), "grid": list(held.space.grid)}
        record["maps"] = {"book": packed["book"], "step": packed["step"]}
        record["cutoffs"] = cutoffs(held)
        if packed["step"] > 0.5:
            held.notes.append("the model is so large that the page holds only map values of |z| of 2 or more")
        record["profiles"] = None if held.profiles is None else held.profiles.tolist()
        blobs.update({f"map-{k}": text for k, text in enumerate(packed["blobs"])})
    if held.courses is not None and held.runs:
        book = codebook(max(float(np.abs(c).max(initial=0)) for c in held.courses), 0.05)
        record["courses"] = {"book": [round(float(v), 4) for v in book]}
        left = ALL_TOKENS
        for i, (scan, course, text) in enumerate(zip(held.runs, held.courses, held.texts)):
            n = min(len(course), RUN_TOKENS, left)
            if n <= 0:
                break
            left -= n
            name = str(getattr(scan, "name", "") or f"run {i}")
            record["runs"].append(
                {"name": name, "n": n, "of": len(course), "tokens": text[:n], "conditions": condition_spans(scan, 0, n)}
            )
            blobs[f"course-{i}"] = blob(encode(course[:n].T, book))
        hidden = len(held.runs) - len(record["runs"])
        cut = sum(run["n"] < run["of"] for run in record["runs"])
        if hidden or cut:
            held.notes.append(
                f"the viewer shows the first {RUN_TOKENS:,} tokens of a run and {ALL_TOKENS:,} in all: {cut} runs are "
                f"cut, {hidden} not shown; all tables use all tokens"
            )
    return record, blobs


def cutoffs(held: Contents) -> list[list[float | None]]:
    """(low, high) of each network; from its mask where it does not say."""
    known = getattr(held.networks, "cutoffs", None)
    if known is None:
        threshold = getattr(held.networks, "threshold", None)
        high = float(threshold) if isinstance(threshold, (int, float)) else None
        return [[None if high is None else -high, high]] * held.n_networks
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
