"""Reading brains: NIfTI images, tables of parcels, text files of regions, folders of subjects."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llmbrain._validation import InputError
from llmbrain.comparison.series import check_tr

Array = NDArray[np.float64]
TABLES = (".npy", ".npz", ".csv", ".tsv", ".txt", ".1d")
IMAGES = (".nii", ".nii.gz")


@dataclass
class FMRI:
    """Time series of one or more subjects.

    Attributes
    ----------
    data : array ``(n_subjects, n_volumes, n_regions)``, float64
        As measured: neither filtered nor scaled. A series that is constant in a subject is NaN.
    subjects, regions : list of str
    tr : float or None
        Seconds, where a NIfTI header says it.
    excluded : dict
        Subjects that were left out, with the reason.
    dead : dict
        Regions that are NaN, by subject.
    masker : object or None
        The fitted nilearn masker: ``masker.inverse_transform`` brings values back into the brain.
    """

    data: Array
    subjects: list[str]
    regions: list[str]
    tr: float | None = None
    excluded: dict[str, str] = field(default_factory=dict)
    dead: dict[str, list[str]] = field(default_factory=dict)
    masker: Any = field(default=None, repr=False)

    @property
    def n_volumes(self) -> int:
        """Volumes of every subject."""
        return self.data.shape[1]

    def __repr__(self) -> str:
        s, t, r = self.data.shape
        return f"FMRI({s} subjects, {t} volumes, {r} regions" + (
            f", {len(self.excluded)} excluded)" if self.excluded else ")"
        )


def load_fmri(
    path: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    atlas: Any = None,
    masker: Any = None,
    pattern: str = "*",
    regions: Sequence[str] | None = None,
    n_volumes: int | None = None,
    tr: float | None = None,
) -> FMRI:
    """Read fMRI time series.

    Parameters
    ----------
    path : path or sequence of paths
        A file, files of several subjects, or a folder with one file a subject. ``.nii``, ``.nii.gz``; tables
        ``(volumes, regions)`` as ``.npy``, ``.npz``, ``.csv``, ``.tsv`` or white space separated text, with or
        without a header. An ``.npz`` holds one array, or one a subject; an ``.npy`` may be ``(subjects, volumes,
        regions)``.
    atlas : image or path, optional
        Labels; the mean of each region is taken (nilearn ``NiftiLabelsMasker``).
    masker : nilearn masker, optional
        Any masker, in place of `atlas`. Neither: every voxel of nilearn's mask of the first image.
    pattern : str
        Which files of a folder are subjects, such as ``"*-timecourses.txt"``.
    regions : sequence of str, optional
        Names, where the files have none.
    n_volumes : int, optional
        Keep the first so many volumes of every subject; needed only where subjects differ in length.
    tr : float, optional
        Seconds; compared with the NIfTI header, and a difference is reported.

    Returns
    -------
    FMRI

    Raises
    ------
    InputError
        If subjects differ in length or in regions, a value is infinite or partly missing, or nobody is left.
    """
    if tr is not None:
        check_tr(tr)
    files = _files(path, pattern)
    series: dict[str, Array] = {}
    names: list[str] | None = list(regions) if regions is not None else None
    header_tr: float | None = None
    names_of = _subject_names(files)
    for file in files:
        if file.name.lower().endswith(IMAGES):
            masker, values, labels, seconds = _read_image(file, atlas, masker)
            header_tr = header_tr or seconds
            arrays = {names_of[file]: values}
            names = names or labels
        else:
            arrays, found = _read_table(file, names_of[file])
            names = names or found
        series.update(arrays)
    if tr is not None and header_tr is not None and abs(tr - header_tr) > 1e-3:
        warnings.warn(f"tr={tr:g} s is used, but the NIfTI header says {header_tr:g} s", stacklevel=2)
    fmri = _assemble(series, names, n_volumes)
    fmri.tr, fmri.masker = tr if tr is not None else header_tr, masker
    return fmri


def _files(path: Any, pattern: str) -> list[Path]:
    if isinstance(path, (str, PathLike)):
        paths = [Path(path)]
    else:
        paths = [Path(p) for p in path]
        if not paths:
            raise InputError("fmri: the list of files is empty")
    for p in paths:
        if not p.exists():
            raise FileNotFoundError(f"fmri: nothing at {p}")
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        paths = sorted(p for p in folder.glob(pattern) if p.is_file() and p.name.lower().endswith(TABLES + IMAGES))
        if not paths:
            raise InputError(f"fmri: no file {pattern!r} of a known kind in {folder}: {', '.join(IMAGES + TABLES)}")
    for p in paths:
        if not p.name.lower().endswith(TABLES + IMAGES):
            raise InputError(f"fmri: {p.name} is of no known kind: {', '.join(IMAGES + TABLES)}")
    return paths


def _stem(file: Path) -> str:
    return re.sub(r"(\.nii\.gz|\.[^.]+)$", "", file.name, flags=re.IGNORECASE)


def _subject_names(files: Sequence[Path]) -> dict[Path, str]:
    """BIDS label where there is one, else the file name without the ending that all share."""
    stems = [_stem(f) for f in files]
    bids = [re.match(r"(sub-[A-Za-z0-9]+)", stem) for stem in stems]
    if all(bids):
        names = [match[1] for match in bids if match]
    else:
        shortest = min(map(len, stems)) if len(stems) > 1 else 0
        shared = next((stems[0][-n:] for n in range(shortest, 0, -1) if len({stem[-n:] for stem in stems}) == 1), "")
        shared = (re.search(r"[-_.].*", shared) or [""])[0]  # whole parts of a name only
        names = [stem[: len(stem) - len(shared)] for stem in stems]
    if len(set(names)) < len(names):
        names = stems
    if len(set(names)) < len(names):
        raise InputError(
            f"fmri: several files are called {max(names, key=names.count)!r}: one file a subject is expected"
        )
    return dict(zip(files, names))


def _read_table(file: Path, name: str) -> tuple[dict[str, Array], list[str] | None]:
    suffix = file.suffix.lower()
    labels: list[str] | None = None
    if suffix in (".npy", ".npz"):
        content = np.load(file, allow_pickle=False)
        if suffix == ".npy":
            content = {name: content}
        elif len(content.files) == 1:
            content = {name: content[content.files[0]]}
        arrays = {str(key): np.asarray(content[key], dtype=np.float64) for key in content}
    else:
        labels, values = _read_text(file, {".csv": ",", ".tsv": "\t"}.get(suffix, r"\s+"))
        arrays = {name: values}
    flat: dict[str, Array] = {}
    for key, values in arrays.items():
        if values.ndim == 3:
            flat.update({f"{key}-{i:02d}": subject for i, subject in enumerate(values)})
        elif values.ndim in (1, 2):
            flat[key] = values[:, None] if values.ndim == 1 else values
        else:
            raise InputError(
                f"fmri: {file.name} holds an array of shape {values.shape}: (volumes, regions) is expected"
            )
    return flat, labels


def _read_text(file: Path, separator: str) -> tuple[list[str] | None, Array]:
    with file.open(encoding="utf-8-sig") as lines:
        first = re.split(separator, lines.readline().strip())
    missing = ("", "n/a", "nan")
    has_header = any(not _is_number(cell) for cell in first if cell.strip().lower() not in missing)
    table = pd.read_csv(file, sep=separator, header=0 if has_header else None, engine="python", encoding="utf-8-sig",
                        na_values=["n/a"], skipinitialspace=True)  # fmt: skip
    wrong = [column for column in table.columns if not pd.api.types.is_numeric_dtype(table[column])]
    if wrong:
        raise InputError(
            f"fmri: column {wrong[0]!r} of {file.name} is not numbers (first value {table[wrong[0]].iloc[0]!r})"
        )
    return [str(c) for c in table.columns] if has_header else None, table.to_numpy(dtype=np.float64)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_image(file: Path, atlas: Any, masker: Any) -> tuple[Any, Array, list[str], float | None]:
    import nibabel as nib
    from nilearn.maskers import NiftiLabelsMasker, NiftiMasker

    image = nib.load(file)
    if len(image.shape) != 4:
        raise InputError(f"fmri: {file.name} has shape {image.shape}: a 4D image (x, y, z, volumes) is expected")
    if masker is None:
        masker = NiftiMasker(standardize=None) if atlas is None else NiftiLabelsMasker(atlas, standardize=None)
    values = np.asarray(masker.fit_transform(image) if not hasattr(masker, "n_elements_") else masker.transform(image))
    names = [str(int(v)) if float(v).is_integer() else str(v) for v in getattr(masker, "labels_", [])][
        -values.shape[1] :
    ]
    seconds = float(image.header.get_zooms()[3]) * {"msec": 1e-3, "usec": 1e-6}.get(
        image.header.get_xyzt_units()[1], 1.0
    )
    labels = names if len(names) == values.shape[1] else [f"voxel{i}" for i in range(values.shape[1])]
    return masker, values.astype(np.float64), labels, seconds if seconds > 0 else None


def _assemble(series: dict[str, Array], names: list[str] | None, n_volumes: int | None) -> FMRI:
    """Leave out subjects without any signal, mark dead series, and stack the rest."""
    widths = {key: values.shape[1] for key, values in series.items()}
    if len(set(widths.values())) > 1:
        raise InputError(f"fmri: subjects differ in their number of regions: {widths}")
    n_regions = next(iter(widths.values()))
    if names is None:
        names = [f"region{i}" for i in range(n_regions)]
    if len(names) != n_regions:
        raise InputError(f"regions: {len(names)} names for {n_regions} regions")
    excluded: dict[str, str] = {}
    dead: dict[str, list[str]] = {}
    kept: dict[str, Array] = {}
    for subject, values in series.items():
        if np.isinf(values).any():
            raise InputError(
                f"fmri: subject {subject} has infinite values in {names[int(np.argwhere(np.isinf(values))[0][1])]}"
            )
        missing = np.isnan(values)
        partly = missing.any(axis=0) & ~missing.all(axis=0)
        if partly.any():
            region = int(np.argmax(partly))
            raise InputError(
                f"fmri: subject {subject}, {names[region]}: {int(missing[:, region].sum())} volumes are missing"
            )
        silent = missing.all(axis=0) | (values.max(axis=0) == values.min(axis=0))
        if silent.all():
            zeros = "all zeros" if not np.nan_to_num(values).any() else "no variance in any series"
            excluded[subject] = zeros
            continue
        if silent.any():
            dead[subject] = [names[i] for i in np.flatnonzero(silent)]
        kept[subject] = np.where(silent, np.nan, values)
    for subject, reason in excluded.items():
        warnings.warn(f"fmri: subject {subject} is left out: {reason}", stacklevel=3)
    if dead:
        first = next(iter(dead))
        total = sum(map(len, dead.values()))
        warnings.warn(
            f"fmri: {total} series are constant and become NaN (first: {first}, {dead[first][0]})", stacklevel=3
        )
    if not kept:
        raise InputError(f"fmri: nobody is left: {excluded}")
    if n_volumes is not None:
        short = {k: len(v) for k, v in kept.items() if len(v) < n_volumes}
        if short:
            raise InputError(f"n_volumes={n_volumes}: these subjects have fewer: {short}")
        kept = {k: v[:n_volumes] for k, v in kept.items()}
    lengths = {k: len(v) for k, v in kept.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(
            f"fmri: subjects differ in length: {lengths}; pass n_volumes= to keep the first volumes of each"
        )
    return FMRI(np.stack(list(kept.values())), list(kept), names, excluded=excluded, dead=dead)
