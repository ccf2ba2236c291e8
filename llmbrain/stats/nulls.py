"""Null distributions for correlations of autocorrelated series.

A correlation of two smooth series has far fewer degrees of freedom than volumes, so its parametric p-value is wrong.
Both nulls keep what makes series smooth and break only their alignment in time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.fft import dct, idct, irfft, rfft

from llmbrain._validation import InputError, check_count, check_option, check_whole
from llmbrain.stats.tails import benjamini_hochberg, permutation_p

Array = NDArray[np.float64]
NULLS = ("circular", "phase")
CORRECTIONS = ("max", "fdr")
DEFAULT_PHASE_DRAWS = 1000
SMOOTH = 30.0  # independent times below which circular shifts do not hold their level
_COLUMNS = 8192  # whose spectra are held at once


class SmoothSeriesWarning(UserWarning):
    """Series are too smooth for the null that is asked for."""


class SmoothMapsWarning(UserWarning):
    """A null of unrelated neurons meets data whose neighbours are related."""


def circular_shifts(
    n_volumes: int, min_shift: int, n_permutations: int | None, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Shifts of at least `min_shift` in both directions round the circle: all, or `n_permutations` of them."""
    check_whole("min_shift", min_shift, 1)
    shifts = np.arange(int(min_shift), n_volumes - int(min_shift) + 1)
    if len(shifts) < 19:
        raise InputError(
            f"min_shift={min_shift} leaves {len(shifts)} shifts of {n_volumes} volumes: 19 are needed for p = .05"
        )
    if n_permutations is not None and check_count("n_permutations", n_permutations, 1) < len(shifts):
        shifts = np.sort(rng.choice(shifts, int(n_permutations), replace=False))
    return shifts


def shifts_apart(n_times: int, n_columns: int, min_shift: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A shift for every column, any two of them at least `min_shift` apart on the circle (less where they do not fit).

    A pair that stayed together would keep what is tested.
    """
    apart = min(min_shift, n_times // n_columns)
    if n_times < 2 * min_shift or apart < 1:
        raise InputError(
            f"a run of {n_times} tokens is too short to shift {n_columns} networks by min_shift={min_shift}"
        )
    slack = rng.multinomial(n_times - n_columns * apart, np.full(n_columns, 1 / n_columns))
    return rng.permutation(np.cumsum(apart + slack))


def circular_shift(series: NDArray[Any], shift: int | ArrayLike) -> NDArray[Any]:
    """Move columns in time round the circle: what leaves at the end comes in at the start.

    Parameters
    ----------
    series : array ``(n_times, n_columns)``
    shift : int or int array ``(n_columns,)``
        One for all columns, or one each.
    """
    series, shift = np.asarray(series), np.asarray(shift, dtype=np.int64)
    if shift.ndim == 0:
        return np.roll(series, int(shift), axis=0)
    places = (np.arange(len(series))[:, None] - shift) % len(series)
    return np.take_along_axis(series, places, axis=0)


def phase_randomize(series: ArrayLike, rng: np.random.Generator, *, shared: bool = True) -> NDArray[Any]:
    """A surrogate with the same amplitude spectrum in every column (Theiler 1992; Prichard and Theiler 1994).

    The mean, and for an even number of times the Nyquist frequency, are real and stay as they are.

    Parameters
    ----------
    series : array ``(n_times, n_columns)``
    shared : bool
        One set of random phases for all columns, which keeps their cross-spectra and so their correlations; else each
        column gets phases of its own, and none knows the others.

    Returns
    -------
    array like `series`, float32 if that is float32, else float64
    """
    values = np.asarray(series)
    values = values if values.dtype == np.float32 else values.astype(np.float64)
    n = len(values)
    out = np.empty_like(values)
    common = rng.random((n // 2 + 1, 1)) if shared else None
    for start in range(0, values.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        spectrum = rfft(values[:, part], axis=0)
        turn = np.exp(2j * np.pi * (common if common is not None else rng.random(spectrum.shape)))
        turn[0] = 1.0
        if n % 2 == 0:
            turn[-1] = 1.0
        out[:, part] = irfft(spectrum * turn.astype(spectrum.dtype), n=n, axis=0)
    return out


def independent_times(*series: Array) -> float:
    """How many independent times a correlation of these series is worth (Bartlett 1946), in the median column.

    ``n / (1 + 2 sum rho_a(k) rho_b(k))`` with the autocorrelations of two sets (or of one with itself), summed until
    they are lost in noise; about ``n (1 - a b) / (1 + a b)`` for AR(1) series.

    Parameters
    ----------
    *series : arrays ``(n_times, n_columns)``
        One or two; constant columns are left out.
    """
    n = len(series[0])
    rho = []
    for values in (series[0], series[-1]):
        z = values - values.mean(axis=0)
        z = z[:, np.ptp(z, axis=0) > 0]
        power = np.abs(rfft(z, 2 * n, axis=0)) ** 2
        auto = irfft(power, 2 * n, axis=0)[: n // 2]
        rho.append(np.median(auto / auto[0], axis=1) if z.shape[1] else np.zeros(n // 2))
    product = rho[0] * rho[1]
    below = np.flatnonzero(product < 2.0 / n)
    last = int(below[0]) if len(below) else len(product)
    return float(n / (1 + 2 * product[1:last].sum()))


def warn_if_too_smooth(null: str, *series: Array) -> None:
    """Say that circular shifts are too few and too alike for series that change this slowly."""
    worth = independent_times(*series)
    if null == "circular" and worth < SMOOTH:
        warnings.warn(
            f"{len(series[0])} volumes are worth about {worth:.0f} independent ones, so smooth are the series: "
            "p-values of circular shifts are too small here; take null='phase', a high-pass, or more volumes",
            SmoothSeriesWarning, stacklevel=4,
        )  # fmt: skip


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
    n_permutations: int | None = None,
    min_shift: int = 10,
    n_slow: int = 0,
    fill: Callable[[np.random.Generator], Array] | None = None,
    random_state: int | None = 0,
) -> Iterator[Array]:
    """Copies of all columns of `series` moved in time together.

    Parameters
    ----------
    series : array ``(n_volumes, n_columns)``
    null : {"circular", "phase"}
        Circular shifts by at least `min_shift` volumes, or phase randomization.
    n_permutations : int, optional
        Default: every shift, or 1000 phase draws. There are never more shifts than ``n_volumes - 2 min_shift + 1``.
    n_slow : int
        Number of slow cosines that a high-pass has removed (`missing_cosines`). Moving a filtered series and
        filtering it again is not the same as filtering a series that was moved: energy next to the cut-off is lost,
        the null gets too narrow, and false positives double (measured: .10 for .05 at AR .9 and 362 volumes). So the
        missing part is filled in before the move with that next to the cut-off, mirrored and with random signs (the
        same for all columns); the caller filters again.
    fill : callable, optional
        What else is filled in before a move, drawn anew for each: of a generator, an array like `series`.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.

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
        whole = series if fill is None else series + fill(rng)
        return whole + cosines @ (mirrored * rng.choice([-1.0, 1.0], (n_slow, 1))) if n_slow else whole

    if null == "circular":
        for shift in circular_shifts(n, min_shift, n_permutations, rng):
            yield circular_shift(filled(), shift)
        return
    draws = DEFAULT_PHASE_DRAWS if n_permutations is None else int(check_count("n_permutations", n_permutations, 1))
    for _ in range(draws):
        yield phase_randomize(filled(), rng)


def sign_flip_test(
    subject_r: ArrayLike, correction: str = "max", *, n_permutations: int = 2000, random_state: int | None = 0
) -> tuple[Array, Array]:
    """Random-effects test over subjects: is the mean Fisher z of their correlations other than zero.

    Parameters
    ----------
    subject_r : array ``(S, ...)``
        Correlations; NaN where a subject lacks the region.
    n_permutations : int
        Null draws.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.

    Returns
    -------
    r : array ``(...)``
        Mean of Fisher z, brought back to r.
    p : array ``(...)``
        From `n_permutations` random sign flips of whole subjects of the t statistic, corrected over all entries
        (`correction`).
    """
    z = np.arctanh(np.clip(np.asarray(subject_r, dtype=np.float64), -1 + 1e-12, 1 - 1e-12))
    count = np.isfinite(z).sum(axis=0)
    usable = count >= 2
    if not usable.any():
        return np.tanh(z[0]) if len(z) else z, np.full(z.shape[1:], np.nan)
    filled = np.nan_to_num(z)
    squares = (filled**2).sum(axis=0)
    count = np.maximum(count, 2)

    def t_statistic(total: Array) -> Array:
        mean = total / count
        variance = np.maximum(squares - count * mean**2, np.finfo(float).tiny) / (count - 1)
        return np.abs(np.where(usable, mean / np.sqrt(variance / count), 0.0))

    observed = t_statistic(filled.sum(axis=0))
    rng = np.random.default_rng(random_state)
    exceeded = np.zeros(observed.shape)
    for _ in range(n_permutations):
        signs = rng.choice([-1.0, 1.0], len(z))
        draw = t_statistic(np.tensordot(signs, filled, axes=1))
        exceeded += (draw.max() if correction == "max" else draw) >= observed * (1 - 1e-12)
    p = permutation_p(np.where(usable, observed, np.nan), exceeded, n_permutations)
    mean_r = np.where(usable, np.tanh(filled.sum(axis=0) / count), np.nan)
    return mean_r, p if correction == "max" else benjamini_hochberg(p)
