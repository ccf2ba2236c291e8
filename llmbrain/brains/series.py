"""What is done to every series before two of them are compared: the same high-pass, the same scaling, NaN kept
apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_range, check_whole

Array = NDArray[np.float64]
LONGEST_TR = 20.0  # seconds; no one scans slower, and a TR of 2000 is in milliseconds


def check_tr(tr: float | None) -> float:
    """Return `tr` in seconds, or say that it is missing or in milliseconds."""
    if tr is None:
        raise InputError("tr=None: the repetition time is needed, in seconds")
    check_range("tr", tr, 0, open_low=True)
    if tr > LONGEST_TR:
        raise InputError(
            f"tr={tr!r} must be in seconds, at most {LONGEST_TR:g}: is it in milliseconds ({tr / 1000:g} s)?"
        )
    return float(tr)


def check_series(name: str, series: ArrayLike, n_volumes: int | None = None) -> Array:
    """Return `series` as float64 ``(n_volumes, n_columns)``; a column may be all NaN, not partly."""
    values = np.asarray(series, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or 0 in values.shape:
        raise InputError(f"{name} of shape {np.shape(series)} must be (volumes, columns)")
    if n_volumes is not None and len(values) != n_volumes:
        raise InputError(
            f"{name} has {len(values)} volumes, the other series {n_volumes}: they must be the same volumes"
        )
    bad = ~np.isfinite(values)
    partly = bad.any(axis=0) & ~np.isnan(values).all(axis=0)
    if partly.any():
        column = int(np.argmax(partly))
        raise InputError(
            f"{name} column {column} has {int(bad[:, column].sum())} values that are not finite "
            f"(first at volume {int(np.argmax(bad[:, column]))}): interpolate them, or set the whole series to NaN"
        )
    return values


def cosine_basis(n_volumes: int, tr: float, cutoff: float) -> Array:
    """SPM's high-pass set: a constant and the slow cosines up to a period of `cutoff` seconds.

    Returns
    -------
    array ``(n_volumes, floor(2 n_volumes tr / cutoff + 1))``
        Orthonormal columns, the constant first.
    """
    tr = check_tr(tr)
    check_range("high_pass", cutoff, 2 * tr, open_low=True)
    n_columns = int(np.floor(2 * n_volumes * tr / cutoff + 1))
    if n_columns >= n_volumes:
        raise InputError(
            f"high_pass={cutoff:g} s needs {n_columns} columns for {n_volumes} volumes: choose a longer one"
        )
    return slow_cosines(n_volumes, n_columns)


def slow_cosines(n_volumes: int, n_columns: int) -> Array:
    """The first columns of the orthonormal discrete cosine basis (``spm_dctmtx``), the constant first."""
    basis = np.cos(np.pi * np.outer(2 * np.arange(n_volumes) + 1, np.arange(n_columns)) / (2 * n_volumes))
    return basis / np.linalg.norm(basis, axis=0)


def remove(series: ArrayLike, basis: ArrayLike) -> Array:
    """Residual of every column of `series` after a least-squares fit of the columns of `basis`."""
    values, design = np.asarray(series, dtype=np.float64), np.asarray(basis, dtype=np.float64)
    return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]


def high_pass_filter(series: ArrayLike, tr: float, cutoff: float | None = 128.0) -> Array:
    """Remove drifts slower than `cutoff` seconds by regression on SPM's cosines; None removes only the mean.

    Parameters
    ----------
    series : array ``(n_volumes, n_columns)`` or ``(n_subjects, n_volumes, n_columns)``
    tr : float
        Seconds.
    cutoff : float or None
        Period in seconds, SPM's default 128.
    """
    values = np.asarray(series, dtype=np.float64)
    if cutoff is None:
        return values - values.mean(axis=-2, keepdims=True)
    basis = cosine_basis(values.shape[-2], tr, cutoff)
    return values - basis @ (basis.T @ values)


def standardize(series: ArrayLike) -> Array:
    """Zero mean and unit SD over volumes (the second last axis); constant series become NaN."""
    values = np.asarray(series, dtype=np.float64)
    if values.ndim == 1:
        values = values[:, None]
    scale = np.nanmax(np.abs(values), axis=-2, keepdims=True, initial=0.0, where=np.isfinite(values))
    values = values - values.mean(axis=-2, keepdims=True)
    sd = values.std(axis=-2, keepdims=True)
    # what rounding leaves of a constant is not a signal
    alive = sd > 1e-12 * np.where(np.isfinite(scale), scale, 0.0)
    return np.divide(values, sd, out=np.full_like(values, np.nan), where=alive & np.isfinite(sd))


def prepare(series: ArrayLike, tr: float, *, high_pass: float | None = 128.0, drop: int = 0) -> Array:
    """Drop the first volumes, high-pass, standardise: to be called in the same way for both brains.

    Parameters
    ----------
    series : array ``(n_volumes, n_columns)`` or ``(n_subjects, n_volumes, n_columns)``
    tr, high_pass : float
        Seconds; `high_pass` None removes only the mean.
    drop : int
        Volumes at the start that hold the onset transient (10 to 14 are usual for stories), dropped before the filter
        so that they do not bend it.

    Returns
    -------
    array ``(..., n_volumes - drop, n_columns)``
        Constant series are NaN.
    """
    values = np.asarray(series, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    check_whole("drop", drop, 0, values.shape[-2] - 3)
    values = values[..., int(drop) :, :]
    filtered = high_pass_filter(values, tr, high_pass)
    filtered[np.isnan(standardize(values))] = np.nan  # the filter would leave rounding errors of a constant
    return standardize(filtered)


def orthonormal(columns: ArrayLike, n_volumes: int, name: str = "nuisance") -> Array:
    """Orthonormal basis of a constant and `columns`, rank-revealing.

    Raises
    ------
    InputError
        If more regressors than volumes leave nothing to explain.
    """
    values = check_series(name, columns, n_volumes)
    if np.isnan(values).any():
        raise InputError(f"{name} column {int(np.argmax(np.isnan(values).any(axis=0)))} is NaN: leave it out")
    if values.shape[1] + 2 >= n_volumes:
        raise InputError(
            f"{name} has {values.shape[1]} regressors for {n_volumes} volumes: nothing would be left to explain"
        )
    design = np.column_stack([np.ones(n_volumes), np.nan_to_num(standardize(values))])
    u, s, _ = np.linalg.svd(design, full_matrices=False)
    return u[:, s > s[0] * 1e-10]
