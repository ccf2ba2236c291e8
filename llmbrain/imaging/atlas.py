"""Atlases: what the labels of an image are called, where they lie, and what a place of a brain is called."""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError
from llmbrain.imaging.grid import load_image, spatial_shape

if TYPE_CHECKING:
    from nibabel.spatialimages import SpatialImage

    Image: TypeAlias = SpatialImage | str | Path
    Labels: TypeAlias = Mapping[int, str] | Sequence[str] | str | Path

Array = NDArray[np.float64]
NUMBERS = ("index", "value", "id", "no", "number", "code", "key", "label", "labelid", "roi", "intensity")
NAMES = ("name", "labelname", "regionname", "roiname", "region", "structure", "label", "fullname", "abbreviation")
BESIDE = (".tsv", ".csv")  # of a label image: BIDS writes x_dseg.tsv beside x_dseg.nii.gz
SHOWN = 5


@dataclass(frozen=True)
class Atlas:
    """An image of whole numbers, one a region, and what the regions are called.

    Attributes
    ----------
    image : nibabel image (x, y, z)
    values : int array ``(n_regions,)``
        Those of its voxels, rising; 0 is the background.
    names : list of str
        One a region; its number where the table has no name for it, and behind a name that several have.
    """

    image: SpatialImage
    values: NDArray[np.int64]
    names: list[str]

    @classmethod
    def of(cls, image: Image, labels: Labels | None = None) -> Atlas:
        """Read an atlas.

        Parameters
        ----------
        image : NIfTI image or path
        labels : mapping of value to name, sequence of names, or path, optional
            A path: see `read_labels`. Names in a sequence are those of the values from 1, or from 0 where there is one
            more. Default: the table of the same name beside the image (BIDS: ``*_dseg.tsv``), else numbers.

        Raises
        ------
        InputError
            If the image has other values than whole numbers from 0, or labels do not fit it.
        """
        loaded, path = load_image(image, whole=True)
        shape, _ = spatial_shape(loaded, "atlas", volumes=False)
        voxels = np.asarray(loaded.dataobj).reshape(shape)
        values = np.unique(voxels[np.isfinite(voxels)])
        whole = np.rint(values).astype(np.int64)
        if not np.array_equal(whole, values) or (whole < 0).any() or not (whole > 0).any():
            raise InputError(f"atlas must hold a whole number a region, and 0 elsewhere; it holds {values[:SHOWN]}")
        whole = whole[whole > 0]
        beside = None if path is None else _table_beside(path)
        if labels is None and beside is not None:
            try:
                labels = read_labels(beside)
            except InputError as error:
                warnings.warn(f"atlas: the table beside it is not read: {error}", stacklevel=2)
        named = _named(read_labels(labels) if isinstance(labels, (str, Path)) else labels, whole)
        missing = [int(v) for v in whole if int(v) not in named]
        if named and missing:
            warnings.warn(
                f"atlas: {len(missing)} of {len(whole)} regions have no name in the table (first: {missing[:SHOWN]}); "
                "they are called by their number", stacklevel=2,
            )  # fmt: skip
        names = [named.get(int(v), str(int(v))) for v in whole]
        twice = {name for name in names if names.count(name) > 1}
        return cls(loaded, whole, [f"{name} ({int(v)})" if name in twice else name for name, v in zip(names, whole)])

    @property
    def is_named(self) -> bool:
        """Whether there are names, not only numbers."""
        return any(name != str(value) for name, value in zip(self.names, self.values))

    def name_of(self, value: float) -> str:
        """What a value is called; empty for the background."""
        at = int(np.searchsorted(self.values, value))
        found = at < len(self.values) and self.values[at] == value
        return self.names[at] if found else "" if value == 0 or not np.isfinite(value) else str(int(value))

    def centers(self) -> Array:
        """Centers of mass of the regions ``(n_regions, 3)``, in millimeters by the affine."""
        shape = self.image.shape[:3]
        voxels = np.asarray(self.image.dataobj).reshape(shape)
        places = np.argwhere(np.nan_to_num(voxels) > 0)
        which = np.searchsorted(self.values, voxels[tuple(places.T)])
        count = np.bincount(which, minlength=len(self.values))
        means = np.column_stack([np.bincount(which, weights=places[:, i], minlength=len(count)) for i in range(3)])
        affine = np.asarray(self.image.affine)
        return np.asarray((means / count[:, None]) @ affine[:3, :3].T + affine[:3, 3])

    def at(self, places: ArrayLike) -> list[str]:
        """What the atlas calls places ``(n, 3)`` in millimeters: the region of the nearest voxel; empty outside."""
        inverse = np.linalg.inv(np.asarray(self.image.affine, dtype=np.float64))
        shape = self.image.shape[:3]
        voxels = np.asarray(self.image.dataobj).reshape(shape)
        index = np.rint(np.asarray(places) @ inverse[:3, :3].T + inverse[:3, 3]).astype(np.int64)
        inside = ((index >= 0) & (index < shape)).all(axis=1)
        found = np.zeros(len(index))
        found[inside] = voxels[tuple(index[inside].T)]
        return [self.name_of(value) for value in found]


def _table_beside(path: Path) -> Path | None:
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    return next((file for file in (path.with_name(stem + ending) for ending in BESIDE) if file.is_file()), None)


def _named(labels: Mapping[int, str] | Sequence[str] | None, values: NDArray[np.int64]) -> dict[int, str]:
    if labels is None:
        return {}
    if isinstance(labels, Mapping):
        return {int(value): str(name) for value, name in labels.items()}
    names, largest = [str(name) for name in labels], int(values.max())
    if len(names) not in (largest, largest + 1):
        raise InputError(
            f"atlas has values up to {largest} and {len(names)} labels: one label is needed for each value from 0 or 1"
        )
    return dict(enumerate(names, largest + 1 - len(names)))


def read_labels(path: str | Path) -> dict[int, str] | list[str]:
    """What the values of an atlas are called.

    Parameters
    ----------
    path : path
        A table of values and names: CSV or TSV with a header (BIDS ``*_dseg.tsv``: index, name) or without, white space
        (FreeSurfer's and Schaefer's lookup tables; lines that begin with # are comments), JSON (``{"1": "name"}``), or
        names alone, one a line.

    Returns
    -------
    dict of int to str, or list of str
        A list where the file has names alone.

    Raises
    ------
    InputError
        If no column of whole numbers or of names is found, or a value has two names.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"atlas labels: no file at {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"atlas labels: {path.name} is not UTF-8: save it so") from None
    if path.suffix.lower() == ".json":
        return _from_json(text, path)
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise InputError(f"atlas labels: {path.name} is empty")
    rows = _rows(lines)
    if max(map(len, rows)) == 1:
        names = [row[0] for row in rows]
        if all(map(_is_whole, names)):
            raise InputError(f"atlas labels: {path.name} holds numbers alone, and no names")
        return names
    header = rows[0] if not any(map(_is_whole, rows[0])) else None
    body = rows if header is None else rows[1:]
    width = min(map(len, body), default=0)
    numeric = [i for i in range(width) if all(_is_whole(row[i]) for row in body)]
    words = [i for i in range(width) if i not in numeric and not all(_is_number(row[i]) for row in body)]
    number = _column(header, NUMBERS, numeric)
    name = _column(header, NAMES, words)
    if number is None or name is None:
        raise InputError(
            f"atlas labels: {path.name} needs a column of whole numbers and one of names (first row: {body[:1]})"
        )
    found: dict[int, str] = {}
    for row in body:
        value = int(float(row[number]))
        if found.get(value, row[name]) != row[name]:
            raise InputError(f"atlas labels: {path.name} has two names for {value}: {found[value]!r} and {row[name]!r}")
        found[value] = row[name]
    return found


def _from_json(text: str, path: Path) -> dict[int, str] | list[str]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"atlas labels: {path.name} is no JSON: {error}") from None
    if isinstance(content, list) and content and all(isinstance(name, str) for name in content):
        return content
    if isinstance(content, dict) and content:
        if all(map(_is_whole, content)):
            names = {key: _name_in(value) for key, value in content.items()}
            if all(name is not None for name in names.values()):
                return {int(float(key)): str(name) for key, name in names.items()}
        elif all(isinstance(value, int) for value in content.values()):
            return {int(value): str(key) for key, value in content.items()}
    raise InputError(f'atlas labels: {path.name} must be like {{"1": "name", ...}} or a list of names')


def _name_in(value: object) -> str | None:
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("name", "label", "region") if value.get(key)), None)
    return value if isinstance(value, str) else None


def _rows(lines: Sequence[str]) -> list[list[str]]:
    for mark in ("\t", ";", ","):
        if all(mark in line for line in lines):
            return [[cell.strip().strip("\"'") for cell in row] for row in csv.reader(lines, delimiter=mark)]
    rows = [re.split(r"\s+", line.strip()) for line in lines]
    numbered = all(_is_whole(row[0]) and len(row) > 1 for row in rows)
    return rows if numbered else [[line.strip()] for line in lines]


def _is_whole(cell: str) -> bool:
    return re.fullmatch(r"\d{1,15}(\.0*)?", cell.strip()) is not None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _column(header: Sequence[str] | None, usual: Sequence[str], fits: Sequence[int]) -> int | None:
    """The column of a usual name that holds what it should, else the first that does."""
    if header is not None:
        plain = [re.sub(r"[^a-z]", "", cell.lower()) for cell in header]
        for wanted in usual:
            found = [i for i in fits if i < len(plain) and plain[i] == wanted]
            if found:
                return found[0]
    return fits[0] if fits else None
