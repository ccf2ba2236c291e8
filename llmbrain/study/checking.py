"""Whether every file of a study or a model is what was written: the answers of ``llmbrain check``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pandas as pd

from llmbrain._files import AGAIN, COMMIT, SUMS, damages, read_json, read_sums, settle, verify_listed
from llmbrain._validation import InputError
from llmbrain.checkpoints.gguf_opening import check_gguf
from llmbrain.decomposition import read_ica
from llmbrain.imaging import read_nifti
from llmbrain.imaging.dual_regression_folder import RECORD as DUAL_REGRESSION
from llmbrain.imaging.dual_regression_folder import check_dual_regression
from llmbrain.imaging.nifti import sidecar_of
from llmbrain.intervention.table import LesionTable
from llmbrain.networks import FunctionalNetworks
from llmbrain.pruning.experts import read_plan
from llmbrain.scanning import load_scans
from llmbrain.scanning.store import FileShards, read_manifest

SETS = ("pruning.json", "networks.json", "ica.json", "lesion_table.tsv")  # never written without checksums
COLUMNS = ["part", "file", "state", "anew"]


def check(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Compare every file of a study, a scan, networks, a model, a plan or an image with its checksum; reads every byte.

    A save that was killed in a folder is finished first.

    Parameters
    ----------
    path : path

    Returns
    -------
    DataFrame
        One row a file: ``part`` (what it belongs to), ``file`` (relative to `path`), ``state`` (``"ok"``, or what is
        wrong) and ``anew`` (what makes it anew; empty for ``"ok"``).

    Raises
    ------
    InputError
        If nothing is there, or nothing that has checksums.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"path {path} does not exist")
    if path.is_file():
        said = _state(lambda: _open_file(path), "write it again")
        if said is None:
            raise InputError(f"path {path} carries no checksum of llmbrain, and no {SUMS} beside it lists it")
        rows = [(_kind(path), path.name, *said)]
        return pd.DataFrame(rows, columns=COLUMNS)
    found: list[tuple[str, str, str, str]] = []
    for folder in _folders(path):
        part, anew = _part(folder)
        relative = folder.relative_to(path)
        for name, state in _files_of(folder).items():
            found.append((part, (relative / name).as_posix(), state, "" if state == "ok" else anew))
    if not found:
        raise InputError(f"path {path} holds nothing with checksums: no {SUMS} in it or below")
    return pd.DataFrame(found, columns=COLUMNS)


def _folders(path: Path) -> Iterator[Path]:
    """`path` and the folders below it that are checked, or would be if a save had been finished."""
    for folder in (path, *sorted(p for p in path.rglob("*") if p.is_dir() and not p.name.startswith("."))):
        marks = (SUMS, COMMIT, "manifest.json", DUAL_REGRESSION, "plan.json", *SETS)
        files = any(any(folder.glob(pattern)) for pattern in ("*.gguf", "*.nii", "*.nii.gz"))
        if files or any((folder / name).exists() for name in marks):
            yield folder


def _files_of(folder: Path) -> dict[str, str]:
    settle(folder)
    bad = damages(folder)
    states = dict.fromkeys(read_sums(folder, strict=False), "ok") | bad
    if not (folder / SUMS).is_file() and any((folder / name).is_file() for name in SETS):
        states[SUMS] = f"is missing: files of this folder cannot be verified ({AGAIN})"
    checks: dict[str, Callable[[], object]] = {
        "study.json": lambda: read_json(folder / "study.json"),
        "summary.json": lambda: read_json(folder / "summary.json"),
        "plan.json": lambda: read_plan(folder / "plan.json"),
        "manifest.json": lambda: _check_scan(folder),
        "networks.json": lambda: FunctionalNetworks.load(folder),
        "ica.json": lambda: read_ica(folder),
        "lesion_table.tsv": lambda: LesionTable.load(folder),
    }
    for name, opens in checks.items():
        if (folder / name).is_file() and states.get(name, "ok") == "ok":
            states[name] = (_state(opens, "") or ("ok",))[0]
    if (folder / "runs.jsonl").is_file():
        states.setdefault("runs.jsonl", "ok")  # compared with the manifest
    for image in sorted((*folder.glob("*.nii"), *folder.glob("*.nii.gz"))):
        if image.name not in states and sidecar_of(image).is_file():
            states[image.name] = (_state(partial(read_nifti, image), "") or ("ok",))[0]
    for model in sorted(folder.glob("*.gguf")):
        if model.name not in states and (said := _state(partial(_open_file, model), "")) is not None:
            states[model.name] = said[0]
    if (folder / DUAL_REGRESSION).is_file() and states.get(DUAL_REGRESSION, "ok") == "ok":
        states |= {"dr_maps.npy": "ok", "dr_z_maps.npy": "ok"} | check_dual_regression(folder)
    return states


def _check_scan(folder: Path) -> None:
    """Everything that the manifest says; shards are in the checksums, those that are missing are named."""
    load_scans(folder)
    shards = FileShards(folder, read_manifest(folder)["rows"])
    for index in range(shards.n_shards):
        shards.verify(index)


def _state(opens: Callable[[], object], anew: str) -> tuple[str, str] | None:
    """What is wrong and what makes it anew; None where `opens` says that nothing could be wrong."""
    try:
        if opens() is False:
            return None
    except (InputError, OSError) as error:
        return " ".join(str(error).split()), anew
    return "ok", ""


def _open_file(path: Path) -> object:
    """Read one file with whatever checksum it has; False where it has none."""
    listed = path.name in read_sums(path.parent, strict=False)
    if listed:
        verify_listed(path)
    if path.name.endswith((".nii", ".nii.gz")):
        return read_nifti(path)
    if path.suffix == ".json":
        record = read_json(path)
        return read_plan(path) if record.get("llmbrain") in ("pruning plan", "expert plan") else record
    return (path.suffix == ".gguf" and check_gguf(path)) or listed


def _kind(path: Path) -> str:
    if path.suffix == ".gguf":
        return "model"
    return "image" if path.name.endswith((".nii", ".nii.gz")) else "record"


def _part(folder: Path) -> tuple[str, str]:
    """What a folder is, and the command that makes it anew."""
    for mark, part, anew in (
        ("model.onnx", "ONNX", f"llmbrain export ... --out {folder} --overwrite"),
        ("pruning.json", "pruned model", f"llmbrain prune ... --out {folder} --overwrite"),
        ("summary.json", "study", f"llmbrain run ... --out {folder}"),
        ("manifest.json", "scan", f"llmbrain scan ... --out {folder}"),
        ("networks.json", "networks", f"llmbrain decompose {folder.parent} --out {folder} --overwrite"),
        ("ica.json", "ICA", f"llmbrain decompose {folder.parent.parent} --out {folder.parent} --overwrite"),
        (DUAL_REGRESSION, "dual regression", f"remove {folder}, then llmbrain dualreg {folder.parent} --out {folder}"),
        ("lesions.json", "lesions", f"llmbrain lesion ... --out {folder}"),
        ("lesion_table.tsv", "lesions", f"llmbrain lesion ... --out {folder}"),
        ("comparison.json", "comparison", f"llmbrain compare ... --out {folder} --overwrite"),
        ("dataset_description.json", "BIDS folder", "export_bids(..., overwrite=True)"),
        ("melodic_mix", "MELODIC folder", "write_melodic again"),
        ("config.json", "model", "save or copy the model again"),
        ("study.json", "study", f"the same command with --out {folder}"),
    ):
        if (folder / mark).is_file():
            return part, anew
    return "files", "write them again"
