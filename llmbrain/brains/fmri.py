"""Reading brains: NIfTI images, tables of parcels, text files of regions, folders of subjects."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llmbrain._files import DamagedError, clear_damage
from llmbrain._validation import InputError, check_range, check_whole
from llmbrain.brains.regions import PartMasker, columns_of
from llmbrain.brains.series import check_tr
from llmbrain.brains.tables import Table, orient, read_table
from llmbrain.imaging.atlas import Atlas
from llmbrain.imaging.grid import load_image, seconds_between_volumes
from llmbrain.imaging.surface import Grayordinates, is_surface, read_surface

if TYPE_CHECKING:
    from llmbrain.brains.regions import Wanted
    from llmbrain.imaging.atlas import Labels

Array = NDArray[np.float64]
TABLES = (".npy", ".npz", ".csv", ".tsv", ".txt", ".1d")
IMAGES = (".nii", ".nii.gz", ".gii")  # NIfTI, CIFTI and GIFTI
# files that lie beside the measurements: what BIDS, SPM and people call them
BESIDE = re.compile(
    r"(?i)(confound|regressor|(^|[-_])rp_|^(participants|sessions|readme|licen[cs]e|labels|regions|rois|atlas)$"
    r"|(^|_)(events|physio|channels|motion|mask|dseg|boldref|T1w|T2w|scans|words|stimulus|transcript)$)"
)


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
    places : DataFrame or None
        ``region``, ``x_mm``, ``y_mm``, ``z_mm``: centers of mass of an atlas's regions, or voxels; one row a region.
    """

    data: Array
    subjects: list[str]
    regions: list[str]
    tr: float | None = None
    excluded: dict[str, str] = field(default_factory=dict)
    dead: dict[str, list[str]] = field(default_factory=dict)
    masker: Any = field(default=None, repr=False)
    places: pd.DataFrame | None = field(default=None, repr=False)

    def only(self, columns: NDArray[np.int64], subjects: NDArray[np.int64] | None = None) -> FMRI:
        """Some of the regions (and subjects), by their places."""
        people = np.arange(len(self.subjects)) if subjects is None else np.asarray(subjects)
        names = [self.regions[i] for i in columns]
        who = [self.subjects[i] for i in people]
        dead = {key: [name for name in self.dead[key] if name in set(names)] for key in who if key in self.dead}
        return replace(
            self, data=self.data[people][..., columns], subjects=who, regions=names,
            dead={key: lost for key, lost in dead.items() if lost},
            masker=None if self.masker is None else PartMasker(self.masker, np.asarray(columns), len(self.regions)),
            places=None if self.places is None else self.places.iloc[columns].reset_index(drop=True),
        )  # fmt: skip

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
    atlas_labels: Labels | None = None,
    masker: Any = None,
    pattern: str = "*",
    regions: Sequence[str] | None = None,
    rois: Wanted | None = None,
    n_volumes: int | None = None,
    tr: float | None = None,
    orientation: str = "auto",
    expected: float | None = None,
) -> FMRI:
    """Read fMRI time series.

    Parameters
    ----------
    path : path or sequence of paths
        A file, files of several subjects, or a folder with one file a subject (in subfolders too: BIDS derivatives).
        ``.nii``, ``.nii.gz`` (4D, or 5D with an axis of length 1), CIFTI (``.ptseries.nii``, ``.dtseries.nii``), GIFTI;
        tables ``(volumes, regions)`` or ``(regions, volumes)`` as ``.npy``, ``.npz``, ``.csv``, ``.tsv`` or white space
        separated text, with or without a header. An ``.npz`` holds one array, or one a subject; an array may be
        ``(subjects, volumes, regions)``; a text table may have a column ``subject``. Events, confounds, motion and
        masks that lie beside are not read.
    atlas : image or path, optional
        Labels; the mean of each region is taken (nilearn ``NiftiLabelsMasker``). With tables that have a column for
        every label, it says where in the brain they are: by their names, else in the order of the labels.
    atlas_labels : path, mapping or sequence, optional
        What the labels are called: a table (CSV, TSV, lookup table, JSON), see `llmbrain.imaging.read_labels`. Default:
        the table of the same name beside the atlas (BIDS ``*_dseg.tsv``).
    masker : nilearn masker, optional
        Any masker, in place of `atlas`. Neither: every voxel of nilearn's mask of the first image.
    pattern : str
        Which files of a folder are subjects, such as ``"*-timecourses.txt"``.
    regions : sequence of str, optional
        Names, where the files have none.
    rois : sequence of names or numbers, mapping of such, or path, optional
        Keep only these; see `llmbrain.brains.regions.read_rois`. Numbers are names (values of an atlas); where regions
        have no names, their places from 0.
    n_volumes : int, optional
        Keep the first so many volumes of every subject; needed only where subjects differ in length.
    tr : float, optional
        Seconds; compared with the NIfTI header, and a difference is reported.
    orientation : {"auto", "volumes-first", "regions-first"}
        Which axis of a table is time; see `llmbrain.brains.tables.orient` for how "auto" tells.
    expected : float, optional
        About how many volumes the stimulus takes; helps "auto".

    Returns
    -------
    FMRI

    Raises
    ------
    InputError
        If subjects differ in length, in regions or in the TR of their headers, a value is infinite or partly missing,
        or nobody is left.
    """
    if tr is not None:
        check_tr(tr)
    if n_volumes is not None:
        check_whole("n_volumes", n_volumes, 1)
    if expected is not None:
        check_range("expected", expected)  # of an offset beyond the story it is negative, and fits no file
    files, chosen = _files(path, pattern)
    tables: dict[str, Table] = {}
    images: dict[str, Array] = {}
    labels: list[str] | None = None
    clocks: dict[str, float] = {}
    first: Grayordinates | None = None
    named = None if atlas is None else _atlas(atlas, atlas_labels)
    own = masker is None
    names_of = _subject_names(files)
    for file in files:
        if file.name.lower().endswith(IMAGES):
            if is_surface(file):
                found_series, surface = read_surface(file, f"fmri: {file.name}")
                first = surface if first is None else first
                first.check_same(surface, f"fmri: {file.name}")
                values, labels, seconds = found_series.astype(np.float64), surface.names, surface.t_r
            else:
                masker, values, labels, seconds = _read_image(file, named, masker)
            if seconds is not None:
                clocks[file.name] = seconds
            images[names_of[file]] = values
            continue
        try:
            found = read_table(file, names_of[file])
        except InputError as error:
            damaged = isinstance(error, DamagedError) and file.suffix.lower() in (".npy", ".npz")
            if chosen or damaged or len(files) == 1:  # an array that cannot be read is no notes that lie beside
                raise
            warnings.warn(f"{error}: the file is left out", stacklevel=2)
            continue
        again = set(found) & set(tables)
        if again:
            raise InputError(f"fmri: subject {min(again)!r} is in {file.name} and in another file")
        tables |= found
    if tables and images:
        raise InputError("fmri: there are images and tables: choose one kind with pattern=, such as '*.nii.gz'")
    if not tables and not images:
        raise InputError(f"fmri: none of the {len(files)} files in {path} is a table of numbers")
    header_tr = _one_tr(clocks)
    names = list(regions) if regions is not None else labels
    if tables:
        images, names = orient(tables, orientation=orientation, regions=regions, n_volumes=n_volumes, expected=expected)
    if tr is not None and header_tr is not None and abs(tr - header_tr) > 1e-3:
        warnings.warn(f"tr={tr:g} s is used, but the NIfTI header says {header_tr:g} s", stacklevel=2)
    fmri = _assemble(images, names, n_volumes)
    fmri.tr = tr if tr is not None else header_tr
    if tables and named is not None:
        _place(fmri, named, names is not None)
    elif not tables and first is None:
        fmri.masker = masker
        fmri.places = _places(named, fmri.regions) if named is not None or not own else _voxels(masker, fmri.regions)
    if rois is None:
        return fmri
    by_place = (names is None or not tables) and named is None
    return fmri.only(columns_of(rois, fmri.regions, numbered=by_place))


def _one_tr(clocks: dict[str, float]) -> float | None:
    """The TR of all headers, or an error that names two that differ."""
    if not clocks:
        return None
    first = next(iter(clocks))
    other = next((name for name, seconds in clocks.items() if abs(seconds - clocks[first]) > 1e-3 * seconds), None)
    if other is not None:
        raise InputError(
            f"fmri: {other} has a TR of {clocks[other]:g} s, {first} one of {clocks[first]:g} s: runs of different TR "
            "cannot be mixed (resample them, or correct the header)"
        )
    return clocks[first]


def _files(path: Any, pattern: str) -> tuple[list[Path], bool]:
    """Files to read, and whether they were named one by one (or by a pattern)."""
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
        return _folder(paths[0], pattern), pattern != "*"
    for p in paths:
        if not p.name.lower().endswith(TABLES + IMAGES):
            raise InputError(f"fmri: {p.name} is of no known kind: {', '.join(IMAGES + TABLES)}")
    return paths, True


def _folder(folder: Path, pattern: str) -> list[Path]:
    """One file a subject: of the folder, else of its subfolders; without what only lies beside."""

    def known(files: Iterable[Path], beside: bool = pattern != "*") -> list[Path]:
        kind = (p for p in files if p.name.lower().endswith(TABLES + IMAGES) and p.is_file())
        return sorted(p for p in kind if beside or not BESIDE.search(_stem(p)))

    paths = known(folder.glob(pattern)) or known(folder.rglob(pattern)) or known(folder.glob(pattern), True)
    if not paths:
        raise InputError(f"fmri: no file {pattern!r} of a known kind in {folder}: {', '.join(IMAGES + TABLES)}")
    if pattern == "*":  # BIDS says which files are measurements
        paths = [p for p in paths if re.search(r"_(bold|timeseries)$", _stem(p))] or paths
    return paths


def _stem(file: Path) -> str:
    return re.sub(r"(\.nii\.gz|\.[^.]+)$", "", file.name, flags=re.IGNORECASE)


def _subject_names(files: Sequence[Path]) -> dict[Path, str]:
    """BIDS label where there is one, else the file name without the ending that all share, else the folder."""
    stems = [_stem(f) for f in files]
    bids = [re.search(r"(?:^|[/_])(sub-[A-Za-z0-9]+)", f"{f.parent.name}/{stem}") or
            re.search(r"(?:^|/)(sub-[A-Za-z0-9]+)(?=/)", f.as_posix()) for f, stem in zip(files, stems)]  # fmt: skip
    if all(bids):
        names = [match[1] for match in bids if match]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            own = [f.name for f, name in zip(files, names) if name == twice]
            raise InputError(f"fmri: {len(own)} files of {twice} ({', '.join(own[:3])}): one file a subject is "
                             "expected; choose with pattern=, such as '*run-1*'")  # fmt: skip
        return dict(zip(files, names))
    shortest = min(map(len, stems)) if len(stems) > 1 else 0
    shared = next((stems[0][-n:] for n in range(shortest, 0, -1) if len({stem[-n:] for stem in stems}) == 1), "")
    shared = (re.search(r"[-_.].*", shared) or [""])[0]  # whole parts of a name only
    short = [stem[: len(stem) - len(shared)] for stem in stems]
    folders = [f.parent.name for f in files]
    for names in (short, stems, folders, [f"{a}-{b}" for a, b in zip(folders, stems)]):
        if len(set(names)) == len(names) and all(names):
            return dict(zip(files, names))
    raise InputError(f"fmri: several files are called {max(stems, key=stems.count)!r}: one file a subject is expected")


def _atlas(atlas: Any, labels: Labels | None) -> Atlas:
    if isinstance(atlas, (str, PathLike)) and not Path(atlas).is_file():
        raise FileNotFoundError(f"atlas: no file at {atlas}")
    return Atlas.of(Path(atlas) if isinstance(atlas, (str, PathLike)) else atlas, labels)


def _places(atlas: Atlas | None, names: Sequence[str]) -> pd.DataFrame | None:
    """Centers of the regions of an atlas, in the order of `names`."""
    if atlas is None:
        return None
    place = {name: i for i, name in enumerate(atlas.names)} | {str(v): i for i, v in enumerate(atlas.values)}
    if not all(name in place for name in names):
        return None
    return _frame(names, atlas.centers()[[place[name] for name in names]])


def _voxels(masker: Any, names: Sequence[str]) -> pd.DataFrame:
    mask = masker.mask_img_
    voxels = np.argwhere(np.asarray(mask.dataobj) > 0)
    return _frame(names, voxels @ mask.affine[:3, :3].T + mask.affine[:3, 3])


def _frame(names: Sequence[str], centers: Array) -> pd.DataFrame:
    frame = pd.DataFrame(np.round(centers, 1), columns=["x_mm", "y_mm", "z_mm"])
    frame.insert(0, "region", list(names))
    return frame


def _place(fmri: FMRI, atlas: Atlas, has_names: bool) -> None:
    """Give tables what the atlas knows: names, centers, and the way back into the brain."""
    from nilearn.maskers import NiftiLabelsMasker

    n = len(fmri.regions)
    if len(atlas.values) != n:
        warnings.warn(f"atlas has {len(atlas.values)} labels, the tables {n} regions: no brain map", stacklevel=3)
        return
    masker = NiftiLabelsMasker(atlas.image, standardize=None).fit()
    before = list(fmri.regions)
    for known in (atlas.names, [str(value) for value in atlas.values]):
        if has_names and set(fmri.regions) == set(known):
            order = np.array([known.index(name) for name in fmri.regions])
            fmri.regions = [atlas.names[i] for i in order]
            fmri.places = _places(atlas, fmri.regions)
            fmri.masker = PartMasker(masker, order, n)
            fmri.dead = _renamed(fmri.dead, before, fmri.regions)
            return
    if has_names:
        warnings.warn(
            f"atlas: the columns are not called as its labels are ({fmri.regions[0]!r}; {atlas.names[0]!r}): they are "
            "taken to be in the order of the labels", stacklevel=3,
        )  # fmt: skip
    fmri.places = _frame(fmri.regions, atlas.centers())
    if not has_names and atlas.is_named:
        fmri.regions = list(atlas.names)
        fmri.places["region"] = fmri.regions
        fmri.dead = _renamed(fmri.dead, before, fmri.regions)
    fmri.masker = masker


def _renamed(dead: dict[str, list[str]], before: Sequence[str], after: Sequence[str]) -> dict[str, list[str]]:
    new = dict(zip(before, after))
    return {who: [new[name] for name in lost] for who, lost in dead.items()}


def _read_image(file: Path, atlas: Atlas | None, masker: Any) -> tuple[Any, Array, list[str], float | None]:
    from nilearn.maskers import NiftiLabelsMasker, NiftiMasker

    image, _ = load_image(file, whole=True)
    seconds = seconds_between_volumes(image)
    if len(image.shape) == 5 and image.shape[3] == 1:
        image = type(image)(np.asarray(image.dataobj)[..., 0, :], image.affine)
    if len(image.shape) != 4:
        raise InputError(f"fmri: {file.name} has shape {image.shape}: a 4D image (x, y, z, volumes) is expected")
    if masker is None:
        masker = NiftiMasker(standardize=None) if atlas is None else NiftiLabelsMasker(atlas.image, standardize=None)
    with clear_damage(file, "a 4D NIfTI image"):
        fitted = hasattr(masker, "n_elements_")
        values = np.asarray(masker.transform(image) if fitted else masker.fit_transform(image))
    found = [float(v) for v in getattr(masker, "labels_", []) if not isinstance(v, str)][-values.shape[1] :]
    called = str if atlas is None else atlas.name_of
    names = [called(int(v)) if v.is_integer() else str(v) for v in found]
    labels = names if len(names) == values.shape[1] else [f"voxel{i}" for i in range(values.shape[1])]
    return masker, values.astype(np.float64), labels, seconds


def _assemble(series: dict[str, Array], names: list[str] | None, n_volumes: int | None) -> FMRI:
    """Leave out subjects without any signal, mark dead series, and stack the rest."""
    widths = {key: values.shape[1] for key, values in series.items()}
    if len(set(widths.values())) > 1:
        raise InputError(f"fmri: subjects differ in their number of regions: {_few(widths)}; pattern= chooses files")
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
        if 0 in values.shape:
            raise InputError(
                f"fmri: subject {subject} has no values: {values.shape[0]} volumes of {values.shape[1]} regions"
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
            f"fmri: subjects differ in length: {_few(lengths)}; pass n_volumes= to keep the first volumes of each"
        )
    return FMRI(np.stack(list(kept.values())), list(kept), names, excluded=excluded, dead=dead)


def _few(sizes: dict[str, int]) -> str:
    """Sizes of all, or of one subject a size where they are many."""
    if len(sizes) <= 4:
        return str(sizes)
    first = {size: who for who, size in reversed(sizes.items())}
    counts = [f"{size} in {list(sizes.values()).count(size)} (as {first[size]})" for size in sorted(first)]
    return ", ".join(counts)
