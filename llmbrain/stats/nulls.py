"""Null distributions for correlations of autocorrelated series.

A correlation of two smooth series has far fewer degrees of freedom than volumes, so its parametric p-value is wrong.
Both nulls keep what makes series smooth and break only their alignment in time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.fft import dct, idct

from llmbrain._validation import InputError, check_option, check_range

Array = NDArray[np.float64]
NULLS = ("circular", "phase")
CORRECTIONS = ("max", "fdr")
DEFAULT_PHASE_DRAWS = 1000


def circular_shifts(n_volumes: int, min_shift: int, n_null: int | None, rng: np.random.Generator) -> NDArray[np.int64]:
    """Shifts of at least `min_shift` volumes in both directions round the circle: all, or `n_null` of them."""
    check_range("min_shift", min_shift, 1)
    shifts = np.arange(int(min_shift), n_volumes - int(min_shift) + 1)
    if len(shifts) < 19:
        raise InputError(
            f"min_shift={min_shift} leaves {len(shifts)} shifts of {n_volumes} volumes: 19 are needed for p = .05"
        )
    if n_null is not None and check_range("n_null", n_null, 1) < len(shifts):
        shifts = np.sort(rng.choice(shifts, int(n_null), replace=False))
    return shifts


def phase_randomize(series: ArrayLike, rng: np.random.Generator) -> Array:
    """A surrogate with the same spectrum in every column, and the same cross-spectra between columns.

    One set of random phases is added to all columns; the mean (and the Nyquist frequency, for an even number of
    volumes) stays real (Prichard & Theiler 1994).

    Parameters
    ----------
    series : array ``(n_volumes, n_columns)``
    """
    values = np.asarray(series, dtype=np.float64)
    n_volumes = len(values)
    spectrum = np.fft.rfft(values, axis=0)
    turn = np.exp(2j * np.pi * rng.random(len(spectrum)))
    turn[0] = 1.0
    if n_volumes % 2 == 0:
        turn[-1] = 1.0
    return np.fft.irfft(spectrum * turn[:, None], n=n_volumes, axis=0)


def missing_cosines(*series: Array) -> int:
    """How many of the slowest cosines (after the constant) a high-pass took from all columns of all `series`."""
    absent = []
    for values in series:
        energy = dct(values, axis=0, norm="ortho") ** 2
        absent.append((energy[1:] <= 1e-12 * energy.sum(axis=0)).all(axis=1))
    gone = np.logical_and.reduce(absent)
    count = int(np.argmin(gone)) if not gone.all() else 0
    return count if 2 * count + 1 < len(gone) else 0


def surrogates(
    series: Array,
    null: str,
    *,
    n_null: int | None = None,
    min_shift: int = 10,
    n_slow: int = 0,
    random_state: int = 0,
) -> Iterator[Array]:
    """Copies of all columns of `series` moved in time together.

    Parameters
    ----------
    series : array ``(n_volumes, n_columns)``
    null : {"circular", "phase"}
        Circular shifts by at least `min_shift` volumes, or phase randomisation.
    n_null : int, optional
        Default: every shift, or 1000 phase draws. There are never more shifts than ``n_volumes - 2 min_shift + 1``.
    n_slow : int
        Number of slow cosines that a high-pass has removed (`missing_cosines`). Moving a filtered series and
        filtering it again is not the same as filtering a series that was moved: energy next to the cut-off is lost,
        the null gets too narrow, and false positives double (measured: .10 for .05 at AR .9 and 362 volumes). So the
        missing part is filled in before the move with that next to the cut-off, mirrored and with random signs (the
        same for all columns); the caller filters again.

    Yields
    ------
    array ``(n_volumes, n_columns)``
    """
    check_option("null", null, NULLS)
    rng = np.random.default_rng(random_state)
    n = len(series)
    mirrored = dct(series, axis=0, norm="ortho")[2 * n_slow : n_slow : -1]
    cosines = idct(np.eye(n, n_slow, k=-1), axis=0, norm="ortho")

    def filled() -> Array:
        return series + cosines @ (mirrored * rng.choice([-1.0, 1.0], (n_slow, 1))) if n_slow else series

    if null == "circular":
        for shift in circular_shifts(n, min_shift, n_null, rng):
            yield np.roll(filled(), shift, axis=0)
        return
    for _ in range(DEFAULT_PHASE_DRAWS if n_null is None else int(check_range("n_null", n_null, 1))):
        yield phase_randomize(filled(), rng)


def permutation_p(observed: ArrayLike, exceeded: ArrayLike, n_null: int) -> Array:
    """``(b + 1) / (n + 1)``; NaN where there is no observation."""
    return np.where(np.isnan(np.asarray(observed)), np.nan, (np.asarray(exceeded) + 1.0) / (n_null + 1.0))


def benjamini_hochberg(p: ArrayLike) -> Array:
    """False discovery rate of Benjamini and Hochberg (1995), over all finite p of an array of any shape."""
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    finite = np.isfinite(values)
    flat = values[finite]
    order = np.argsort(flat)[::-1]
    ranks = np.arange(len(flat), 0, -1)
    stepped = np.minimum.accumulate(np.minimum(flat[order] * len(flat) / ranks, 1.0))
    result = np.empty_like(flat)
    result[order] = stepped
    adjusted[finite] = result
    return adjusted
