"""CIFTI (dense and parcellated) and GIFTI: grayordinates, parcels and vertices as columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError
from llmbrain.imaging.grid import check_models, open_image, readable

SUFFIXES = (".dtseries.nii", ".ptseries.nii", ".dscalar.nii", ".pscalar.nii", ".gii")


@dataclass(frozen=True)
class Grayordinates:
    """Where the columns of a surface file lie.

    Attributes
    ----------
    axis : nibabel BrainModelAxis or ParcelsAxis, or None
        None for GIFTI, whose columns are vertices in their order.
    n : int
        Columns.
    t_r : float or None
        Seconds between volumes.
    """

    axis: Any
    n: int
    t_r: float | None

    @property
    def names(self) -> list[str]:
        """What the columns are called: parcels by their names, others by their place."""
        own = getattr(self.axis, "name", None)
        is_parcels = hasattr(self.axis, "nvertices") and not hasattr(self.axis, "vertex")
        if own is not None and is_parcels:
            return [str(name) for name in own]
        return [f"grayordinate{i}" for i in range(self.n)]

    def check_same(self, other: Grayordinates, name: str) -> None:
        """Raise `InputError` where another run has other columns or another TR."""
        same = self.n == other.n and (self.axis is None) == (other.axis is None)
        if not same or (self.axis is not None and self.axis != other.axis):
            raise InputError(f"{name} has other grayordinates ({other.n}) than the runs before it ({self.n})")
        if self.t_r and other.t_r and abs(self.t_r - other.t_r) > 1e-3 * self.t_r:
            raise InputError(
                f"{name} has a TR of {other.t_r:g} s, the runs before it {self.t_r:g} s: runs of different TR cannot "
                "be mixed"
            )

    def image_of(self, maps: ArrayLike) -> Any:
        """Maps ``(K, n)`` as a CIFTI scalar image, or as GIFTI with one array a map."""
        import nibabel as nib

        values = np.atleast_2d(np.asarray(maps, dtype=np.float32))
        if self.axis is None:
            arrays = [nib.gifti.GiftiDataArray(row, intent="NIFTI_INTENT_NONE") for row in values]
            return nib.gifti.GiftiImage(darrays=arrays)
        names = nib.cifti2.ScalarAxis([f"component {k}" for k in range(len(values))])
        return nib.cifti2.Cifti2Image(values, header=(names, self.axis))


def is_surface(item: Any) -> bool:
    """Whether a run is CIFTI or GIFTI, in memory or by its name; a tuple of GIFTI is one run of two hemispheres."""
    if isinstance(item, tuple):
        return bool(item) and all(is_surface(part) for part in item)
    if isinstance(item, (str, Path)):
        return Path(item).name.lower().endswith(SUFFIXES)
    return type(item).__name__ in ("Cifti2Image", "GiftiImage")


def read_surface(item: Any, name: str) -> tuple[NDArray[np.float32], Grayordinates]:
    """Values ``(n_volumes, n_columns)`` of a run, and where its columns lie.

    Parameters
    ----------
    item : CIFTI or GIFTI image, its path, or a tuple of GIFTI (hemispheres, side by side)
    name : str
        What errors call it.

    Raises
    ------
    InputError
        If it is no series, the arrays of a GIFTI differ in length, or a header does not fit its data.
    """
    if isinstance(item, tuple):
        parts = [read_surface(part, name) for part in item]
        if len({len(values) for values, _ in parts}) != 1 or any(place.axis is not None for _, place in parts):
            raise InputError(f"{name}: a tuple is one run of GIFTI hemispheres of one length")
        values = np.concatenate([values for values, _ in parts], axis=1)
        return values, Grayordinates(None, values.shape[1], parts[0][1].t_r)
    with readable(name):
        image = open_image(Path(item)) if isinstance(item, (str, Path)) else item
        if hasattr(image, "darrays"):
            rows = [np.asarray(array.data, dtype=np.float32) for array in image.darrays]
            if not rows or len({row.shape for row in rows}) != 1:
                raise InputError(f"{name}: the arrays of a GIFTI run must be of one length, one a volume")
            values = np.stack(rows) if rows[0].ndim == 1 else np.concatenate([np.atleast_2d(row.T) for row in rows])
            step = image.darrays[0].metadata.get("TimeStep")
            return values, Grayordinates(None, values.shape[1], _seconds(step, 1e-3))
        if not hasattr(image.header, "get_axis"):
            raise InputError(f"{name} is named like CIFTI, and is none")
        shape = tuple(int(n) for n in image.shape)
        check_models(image.header, shape)
        rows_axis, columns = image.header.get_axis(0), image.header.get_axis(1)
        if shape != (len(rows_axis), len(columns)):
            raise ValueError(f"its data have shape {shape}, its axes ({len(rows_axis)}, {len(columns)})")
        values = np.asarray(image.dataobj, dtype=np.float32)
        scale = {"SECOND": 1.0, "MILLISECOND": 1e-3, "MICROSECOND": 1e-6}
        unit = str(getattr(rows_axis, "unit", "SECOND")).upper()
        t_r = _seconds(getattr(rows_axis, "step", None), scale.get(unit, 1.0))
    return values, Grayordinates(columns, values.shape[1], t_r)


def _seconds(step: Any, scale: float) -> float | None:
    """A time step of a header in seconds; None where it says none."""
    seconds = float(step) * scale if step else 0.0
    return seconds if 0 < seconds < math.inf else None
