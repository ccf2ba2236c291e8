"""A folder in the style of BIDS derivatives: scans, events and an ICA under the names that neuroimaging tools expect.

Style, not compliance: BIDS has no word for neurons of a model, for mixing matrices or for component maps, so those
files are listed in ``.bidsignore``, and a registry says what each file means. A token is one volume and counts as one
second, so that events in tokens are events in seconds.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmbrain._files import transaction, write_json, write_table, write_text
from llmbrain._validation import InputError
from llmbrain._version import __version__
from llmbrain.imaging.nifti import write_nifti

README = """A study of a language model, in the style of BIDS derivatives (not BIDS-compliant: see .bidsignore).

sub     a model
task    a text, by name
run     one reading of the text from start to end
volume  one token; RepetitionTime is set to 1, so a token counts as a second and events are in tokens
voxel   one neuron (space-neuron); which one is in the header extension and the .json of each image, and in
        desc-llmbrain_registry.json. There are no millimetres and neighbours mean nothing: do not smooth
bold    only the suffix that tools look for: the values are activations
"""
IGNORED = ("*_mixing.tsv", "*_components.*", "*_decomposition.json", "*_registry.json", "*_tokens.tsv", "SHA256SUMS")
AUTHORS = ("Those who scanned the model", "The llmbrain developers")


def export_bids(
    scans: Sequence[Any],
    folder: str | Path,
    ica: Any = None,
    *,
    images: bool = True,
    authors: Sequence[str] = AUTHORS,
    overwrite: bool = False,
) -> Path:
    """Write scans, and an ICA of them, as a BIDS-derivatives-style folder.

    Parameters
    ----------
    scans : sequence of Scan
    folder : path
        New or empty, unless `overwrite`.
    ica : GroupICA, optional
        Fitted on these scans, in this order: its maps (group level) and time courses (one file a run) are written too.
    images : bool
        Whether to write the 4D images (``.nii.gz``); they are much larger than all else.
    authors : sequence of str
        Of the data set, one a string.
    overwrite : bool
        Write into a folder that is not empty.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    InputError
        If there is no scan, the folder is not empty, or the ICA is not of these scans.
    """
    folder, scans = Path(folder), list(scans)
    if not scans:
        raise InputError("scans is empty: give at least one scan")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise InputError(f"folder={str(folder)!r} is not empty: give another, or overwrite=True")
    if ica is not None:
        _check_ica(ica, scans)
    registry: dict[str, Any] = {"space-neuron": scans[0].space.to_dict(), "files": {}}
    subjects = {stem.partition("/")[0] for stem in _stems(scans)}
    # Of an export that this one replaces; other subjects stay.
    replaces = [*(f"{sub}/func/{sub}_*" for sub in subjects), "group_space-neuron_*"]
    with transaction(folder, replaces=replaces) as new:
        for i, (scan, stem) in enumerate(zip(scans, _stems(scans))):
            _write_run(new / stem, scan, registry, new, images)
            if ica is not None:
                path = new / f"{stem}_space-neuron_desc-ICA_mixing.tsv"
                write_table(path, pd.DataFrame(ica.mixing_[i], columns=_names(ica)))
                _register(registry, new, path, "time course of each component (column) at each token (row)")
        if ica is not None:
            _write_group(new, ica, scans[0].space, registry)
        _write_top(new, scans, registry, authors)
    return folder


def _stems(scans: Sequence[Any]) -> list[str]:
    """``sub-<model>/func/sub-<model>_task-<text>_run-<n>``, unique; labels may hold letters and digits only."""
    seen: Counter[tuple[str, str]] = Counter()
    stems = []
    for scan in scans:
        sub = _label(Path(scan.model_id or "model").name) or "model"
        unnamed = re.fullmatch(r"run-\d+", scan.name)
        task = "reading" if unnamed else _label(scan.name) or "reading"
        seen[sub, task] += 1
        stems.append(f"sub-{sub}/func/sub-{sub}_task-{task}_run-{seen[sub, task]}")
    return stems


def _label(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "", text)


def _names(ica: Any) -> list[str]:
    return [f"component_{k:03d}" for k in range(len(ica.components_))]


def _check_ica(ica: Any, scans: Sequence[Any]) -> None:
    if not hasattr(ica, "components_"):
        raise InputError("ica is not fitted")
    lengths = [len(courses) for courses in ica.mixing_]
    if lengths != [scan.n_tokens for scan in scans]:
        raise InputError(
            f"ica was not fitted on these scans: its runs have {lengths} tokens, the scans "
            f"{[scan.n_tokens for scan in scans]}"
        )
    if np.shape(ica.components_)[1] != scans[0].n_neurons:
        raise InputError(f"ica has maps of {np.shape(ica.components_)[1]} neurons, the scans have {scans[0].n_neurons}")


def _write_run(stem: Path, scan: Any, registry: dict[str, Any], folder: Path, images: bool) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    task = re.search(r"task-([A-Za-z0-9]+)", stem.name)
    if len(scan.events):
        events = stem.with_name(f"{stem.name}_events.tsv")
        write_table(events, scan.events, na_rep="n/a")
        write_json(
            events.with_suffix(".json"),
            {"Description": "which tokens belong to which condition of the text",
             "onset": {"Units": "s", "Description": "a token is one volume and counts as one second"},
             "duration": {"Units": "s", "Description": "tokens, of one second each"},
             "trial_type": {"Description": "condition of the text"}},
        )  # fmt: skip
        _register(registry, folder, events, "which tokens belong to which condition")
    tokens = stem.with_name(f"{stem.name}_tokens.tsv")
    # JSON strings, since a token may itself be a tab or the end of a line.
    quoted = [json.dumps(token, ensure_ascii=False) for token in scan.tokens]
    table = pd.DataFrame({"token_id": scan.token_ids, "position": scan.positions, "token": quoted})
    write_table(tokens, table, quoting=3)  # csv.QUOTE_NONE: JSON has escaped what must be
    _register(registry, folder, tokens, "the token of each volume, as a JSON string")
    if images:
        path = stem.with_name(f"{stem.name}_space-neuron_desc-scan_bold.nii.gz")
        blocks = (values for _, values in scan.iter_data())
        meaning = f"activation of each neuron (site {scan.site}) at each token; not BOLD"
        facts = {
            "TaskName": task.group(1) if task else "reading",
            "RepetitionTime": 1.0,
            "StartTime": 0.0,
            "Description": meaning,
            "Sources": [scan.model_id],
            "SkullStripped": False,  # there is no skull; the standard wants to know
            "SpatialReference": "neurons of the model: desc-llmbrain_registry.json says which voxel is which",
        }
        write_nifti(path, blocks, scan.space, scan.n_tokens, facts)
        _register(registry, folder, path, meaning)


def _write_group(folder: Path, ica: Any, space: Any, registry: dict[str, Any]) -> None:
    stem = folder / "group_space-neuron_desc-ICA"
    path = write_nifti(f"{stem}_stat-z_components.nii.gz", np.asarray(ica.components_), space)
    _register(registry, folder, path, "map of each component (volume): one weight a neuron, in SD over neurons")
    parameters = ica.get_params() if hasattr(ica, "get_params") else {}
    learned = {name: getattr(ica, name) for name in ("n_iter_", "converged_") if hasattr(ica, name)}
    path = Path(f"{stem}_decomposition.json")
    record = {"Method": type(ica).__name__, "Parameters": parameters, **learned, "Components": _names(ica)}
    write_json(path, record, default=str)
    _register(registry, folder, path, "how the components were made")


def _write_top(folder: Path, scans: Sequence[Any], registry: dict[str, Any], authors: Sequence[str]) -> None:
    write_json(
        folder / "dataset_description.json",
        {
            "Name": "Scan of a language model",
            "BIDSVersion": "1.9.0",
            "DatasetType": "derivative",
            "Authors": [str(name) for name in authors],
            "GeneratedBy": [{"Name": "llmbrain", "Version": __version__}],
        },
    )
    subjects = {Path(stem).parts[0]: scan.model_id for stem, scan in zip(_stems(scans), scans)}
    table = pd.DataFrame({"participant_id": list(subjects), "model": list(subjects.values())})
    write_table(folder / "participants.tsv", table, na_rep="n/a")
    write_json(
        folder / "participants.json",
        {
            "Description": "the models that were scanned",
            "participant_id": {"Description": "a model"},
            "model": {"Description": "its name on a hub, or its folder"},
        },
    )
    write_text(folder / "README", README)
    write_text(folder / ".bidsignore", "\n".join(IGNORED) + "\n")
    write_json(folder / "desc-llmbrain_registry.json", registry)


def _register(registry: dict[str, Any], folder: Path, path: Path, meaning: str) -> None:
    registry["files"][path.relative_to(folder).as_posix()] = meaning
