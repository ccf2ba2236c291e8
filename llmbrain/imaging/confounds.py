"""Confounds of a run: fMRIPrep's table or another, chosen columns, scrubbed volumes; and a run without them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from llmbrain._files import clear_damage
from llmbrain._validation import InputError, check_range

Array = NDArray[np.float64]
Confounds: TypeAlias = "pd.DataFrame | ArrayLike | str | Path | None"
DEFAULT_COLUMNS = (
    "trans_?", "rot_?", "csf", "white_matter", "cosine*", "motion_outlier*", "non_steady_state_outlier*",
)  # fmt: skip
_COLUMNS_AT_ONCE = 8192


def read_confounds(
    path: str | Path, columns: Sequence[str] = DEFAULT_COLUMNS, *, scrub: float | None = None
) -> pd.DataFrame:
    """Chosen columns of a table of confounds (BIDS: tab-separated, ``n/a`` where there is no value).

    Parameters
    ----------
    path : path
        fMRIPrep's ``*_desc-confounds_timeseries.tsv``, or a table with a header.
    columns : sequence of str
        Names or patterns (``"trans_*"``); a pattern may find nothing, a name must not. Default, of what is there: six
        of motion, CSF, white matter, cosines, and the outliers that fMRIPrep marks.
    scrub : float, optional
        Volumes whose ``framewise_displacement`` exceeds this (mm) get a column of their own: they do not count then.

    Returns
    -------
    DataFrame
        One row a volume. ``n/a`` at the start (derivatives have no first value) is filled with the first value.

    Raises
    ------
    InputError
        If a column is not there, or holds ``n/a`` later on.
    """
    with clear_damage(path, "a table of confounds"):
        table = pd.read_csv(path, sep=None if str(path).endswith((".csv", ".txt")) else "\t", engine="python",
                            na_values=["n/a", "N/A", "NaN", "nan", ""], keep_default_na=False)  # fmt: skip
    chosen: list[str] = []
    for wanted in columns:
        found = [name for name in table.columns if fnmatch(str(name), wanted)]
        if not found and not any(mark in wanted for mark in "*?[") and columns is not DEFAULT_COLUMNS:
            raise InputError(
                f"columns: {wanted!r} is not in {path}; there are {', '.join(map(str, table.columns[:20]))}"
            )
        chosen += [name for name in found if name not in chosen]
    if not chosen and scrub is None:
        raise InputError(f"columns={list(columns)!r} finds nothing in {path}; there are "
                         f"{', '.join(map(str, table.columns[:20]))}")  # fmt: skip
    picked = table[chosen].bfill(limit_area="outside")
    for name in chosen:
        values = pd.to_numeric(picked[name], errors="coerce")
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise InputError(f"{path}: column {name!r} has no number at volume {row} ({table[name].iloc[row]!r})")
        picked[name] = values.astype(np.float64)
    if scrub is not None:
        check_range("scrub", scrub, 0, open_low=True)
        if "framewise_displacement" not in table.columns:
            raise InputError(f"scrub={scrub} needs a column framewise_displacement, which {path} has not")
        moved = pd.to_numeric(table["framewise_displacement"], errors="coerce").fillna(0).to_numpy() > scrub
        marks = {
            f"scrubbed_{volume}": (np.arange(len(table)) == volume).astype(float) for volume in np.flatnonzero(moved)
        }
        picked = pd.concat([picked, pd.DataFrame(marks, index=picked.index)], axis=1)
    return picked


def as_confounds(confounds: pd.DataFrame | ArrayLike | str | Path, n_volumes: int, name: str) -> Array:
    """A table, an array or a path as ``(n_volumes, n_confounds)`` finite numbers."""
    table = read_confounds(confounds) if isinstance(confounds, (str, Path)) else confounds
    values = np.asarray(table, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or len(values) != n_volumes:
        raise InputError(
            f"confounds of {name} have shape {values.shape}: a row is needed for each of {n_volumes} volumes"
        )
    if not np.isfinite(values).all():
        raise InputError(f"confounds of {name} hold NaN or inf: read_confounds fills what is missing at the start")
    return values


def without_confounds(data: NDArray[np.floating], confounds: Array, name: str) -> NDArray[np.floating]:
    """A run ``(n_volumes, n_columns)`` without what its confounds explain by least squares; means stay."""
    centred = confounds - confounds.mean(axis=0)
    left, values, _ = np.linalg.svd(centred / np.maximum(np.linalg.norm(centred, axis=0), 1e-300), full_matrices=False)
    basis = left[:, values > 1e-10 * max(float(values.max(initial=0)), 1e-300)]
    if len(data) - basis.shape[1] < 3:
        raise InputError(f"{name} has {len(data)} volumes and {basis.shape[1]} confounds: nothing would be left")
    out = np.empty_like(data)
    for start in range(0, data.shape[1], _COLUMNS_AT_ONCE):
        part = data[:, start : start + _COLUMNS_AT_ONCE].astype(np.float64)
        out[:, start : start + _COLUMNS_AT_ONCE] = part - basis @ (basis.T @ part)
    return out
