"""Coupling: which network of a model goes up and down with which region of the brain, and is it more than chance."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_option, check_range, check_whole, numbers, seed_of
from llmbrain.brains.series import check_series, orthonormal, slow_cosines, standardize
from llmbrain.comparison.ceilings import noise_ceilings
from llmbrain.comparison.imputation import imputation
from llmbrain.stats.matching import best_pairs
from llmbrain.stats.nulls import CORRECTIONS, NULLS, missing_cosines, sign_flip_test, surrogates, warn_if_too_smooth
from llmbrain.stats.tails import benjamini_hochberg, permutation_p

Array = NDArray[np.float64]


class DeadSeriesWarning(UserWarning):
    """Series that do not change have no correlation."""


@dataclass
class Coupling:
    """Correlations of K networks with R regions. All arrays are ``(K, R)`` unless said otherwise; NaN: a dead series.

    Attributes
    ----------
    r : array
        Pearson correlation with the group's mean series; partial, where nuisance was given.
    r_raw : array
        The same before the nuisance was removed.
    p, p_corrected : arrays
        ``(b + 1) / (n + 1)`` of the null, per pair and corrected over all pairs. Never parametric.
    threshold : float
        |r| that the largest of all pairs reaches in a share `alpha` of the null draws.
    null_max : array ``(n_permutations,)``
        Largest |r| of all pairs in each draw.
    lags : array ``(n_lags,)``; lag_r : array ``(n_lags, K, R)``
        Correlation when the brain is read `lags` volumes later than the model (descriptive: no p-value).
    matches : DataFrame
        One row a pair of the Hungarian matching on |r|: network, region, r (signed), p, p_corrected.
    match_score, match_p : float
        Mean |r| of the matched pairs, and its p-value when the matching is done again in every null draw.
    subject_r : array ``(S, K, R)`` or None
    group_r, p_subjects : array or None
        Mean over subjects (Fisher z, brought back to r), and its sign-flip p-value, corrected like `p_corrected`. It
        says that other listeners would show it, for this stimulus; only `p` says that it is more than two smooth
        series.
    ceilings : DataFrame or None
        See `noise_ceilings`.
    """

    r: Array
    r_raw: Array
    p: Array
    p_corrected: Array
    threshold: float
    null_max: Array
    lags: NDArray[np.int64]
    lag_r: Array
    matches: pd.DataFrame
    match_score: float
    match_p: float
    networks: list[str]
    regions: list[str]
    null: str
    correction: str
    alpha: float
    subject_r: Array | None = None
    group_r: Array | None = None
    p_subjects: Array | None = None
    ceilings: pd.DataFrame | None = field(default=None, repr=False)

    @property
    def n_permutations(self) -> int:
        """Number of null draws."""
        return len(self.null_max)

    @property
    def significant(self) -> NDArray[np.bool_]:
        """Pairs whose corrected p is at most `alpha`."""
        return self.p_corrected <= self.alpha

    def to_frame(self) -> pd.DataFrame:
        """One row a pair, strongest first."""
        k, r = self.r.shape
        best = np.argmax(np.abs(np.nan_to_num(self.lag_r)), axis=0)
        frame = pd.DataFrame({
            "network": np.repeat(self.networks, r),
            "region": np.tile(self.regions, k),
            "r": self.r.ravel(),
            "r_raw": self.r_raw.ravel(),
            "p": self.p.ravel(),
            "p_corrected": self.p_corrected.ravel(),
            "significant": self.significant.ravel(),
            "best_lag": self.lags[best].ravel(),
            "r_best_lag": np.take_along_axis(self.lag_r, best[None], axis=0)[0].ravel(),
        })  # fmt: skip
        if self.group_r is not None and self.p_subjects is not None:
            frame["subject_r"], frame["p_subjects"] = self.group_r.ravel(), self.p_subjects.ravel()
        if self.ceilings is not None:
            frame["ceiling"] = np.tile(self.ceilings["ceiling"], k)
            frame["r_over_ceiling"] = frame["r"] / frame["ceiling"]
        return frame.sort_values("r", key=lambda c: -c.abs(), kind="stable").reset_index(drop=True)


def couple(
    llm_series: ArrayLike,
    brain_series: ArrayLike,
    *,
    null: str = "circular",
    n_permutations: int | None = None,
    correction: str = "max",
    nuisance: ArrayLike | None = None,
    lags: Sequence[int] = range(-6, 7),
    min_shift: int = 10,
    alpha: float = 0.05,
    networks: Sequence[str] | None = None,
    regions: Sequence[str] | None = None,
    random_state: int | None = 0,
) -> Coupling:
    """Correlate every network of a model with every region of a brain, against nulls that keep autocorrelation.

    Parameters
    ----------
    llm_series : array ``(T, K)``
        Networks at the volumes of the scan, from `align`, after the same high-pass as the brain.
    brain_series : array ``(T, R)`` or ``(S, T, R)``
        One subject or several; with several, the tests are on the mean of their standardised series, and the
        correlations of each subject are reported beside.
    null : {"circular", "phase"}
        All networks are shifted together round the circle by at least `min_shift` volumes, or get the same random
        phases.
    n_permutations : int, optional
        Draws; default all shifts, or 1000 random phases.
    correction : {"max", "fdr"}
        Family-wise error by the largest |r| of all pairs in each draw, or Benjamini-Hochberg on the p-values of the
        null.
    nuisance : array ``(T, C)``, optional
        Word rate, sound power...: `r` becomes the partial correlation. What it left of the series is moved, with the
        part that it took filled in as a series of that memory would have it, and cleaned again; see
        `llmbrain.comparison.imputation`.
    lags : sequence of int
        Volumes for the lag profile.
    networks, regions : sequence of str, optional
        Names.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.

    Returns
    -------
    Coupling

    Raises
    ------
    InputError
        If the series have different lengths, or are too short for the null.
    """
    check_option("null", null, NULLS)
    random_state = seed_of(random_state)
    check_option("correction", correction, CORRECTIONS)
    check_range("alpha", alpha, 0, 1, open_low=True, open_high=True)
    lags = [check_whole("lags", lag) for lag in numbers("lags", lags)]
    x = check_series("llm_series", llm_series)
    n = len(x)
    subjects, y = _group(brain_series, n)
    network_names = _names("networks", networks, x.shape[1], "network")
    region_names = _names("regions", regions, y.shape[1], "region")
    x, y = standardize(x), standardize(y)
    for kind, values, labels in (("llm_series", x, network_names), ("brain_series", y, region_names)):
        dead = np.isnan(values).any(axis=0)
        if dead.all():
            raise InputError(f"{kind}: every series is constant or NaN")
        if dead.any():
            first = ", ".join(labels[i] for i in np.flatnonzero(dead)[:5])
            warnings.warn(f"{kind}: {int(dead.sum())} of {dead.size} are constant or NaN ({first}); their r is NaN",
                          DeadSeriesWarning, stacklevel=2)  # fmt: skip

    basis = None if nuisance is None else orthonormal(nuisance, n)
    xc, yc = _clean(x, basis), _clean(y, basis)
    r = xc.T @ yc
    live = np.isfinite(r)
    xl, yl = np.nan_to_num(xc), np.nan_to_num(yc)
    warn_if_too_smooth(null, xl, yl)
    magnitude = np.where(live, np.abs(r), np.inf)
    n_slow = missing_cosines(np.nan_to_num(x), np.nan_to_num(y))
    again = _with_cosines(basis, n, n_slow)
    fill = None if basis is None else imputation(xl, basis, n_slow).draw
    settings: dict[str, Any] = {"n_permutations": n_permutations, "min_shift": min_shift, "n_slow": n_slow}
    exceeded, greatest, pairing = np.zeros(r.shape), [], []
    for moved in surrogates(xl, null, fill=fill, random_state=random_state, **settings):
        draw = np.abs(np.where(live, _clean(moved, again, dead=0.0).T @ yl, 0.0))
        exceeded += draw >= magnitude - 1e-12
        greatest.append(draw.max())
        pairing.append(draw[best_pairs(draw)].mean())
    maxima = np.array(greatest)
    p = permutation_p(r, exceeded, len(maxima))
    if correction == "max":
        p_corrected = permutation_p(r, (maxima[:, None, None] >= magnitude - 1e-12).sum(axis=0), len(maxima))
    else:
        p_corrected = benjamini_hochberg(p)

    rows, columns = best_pairs(r)
    score = float(np.abs(np.nan_to_num(r))[rows, columns].mean())
    match_p = float((1 + np.sum(np.array(pairing) >= score - 1e-12)) / (1 + len(pairing)))
    matches = pd.DataFrame({
        "network": [network_names[i] for i in rows], "region": [region_names[j] for j in columns],
        "r": r[rows, columns], "p": p[rows, columns], "p_corrected": p_corrected[rows, columns],
    })  # fmt: skip
    result = Coupling(
        r=r, r_raw=_unit(x).T @ _unit(y), p=p, p_corrected=p_corrected, threshold=float(np.quantile(maxima, 1 - alpha)),
        null_max=maxima, lags=np.array(lags, dtype=np.int64), lag_r=_lag_profile(xc, yc, lags), matches=matches,
        match_score=score, match_p=match_p,
        networks=network_names, regions=region_names, null=null, correction=correction, alpha=alpha,
    )  # fmt: skip
    if subjects is not None and len(subjects) > 1:
        result.subject_r = np.stack([xc.T @ _clean(standardize(s), basis) for s in subjects])
        result.group_r, result.p_subjects = sign_flip_test(result.subject_r, correction, random_state=random_state)
        result.ceilings = noise_ceilings(subjects, regions=region_names, random_state=random_state)
    return result


def _group(brain_series: ArrayLike, n_volumes: int) -> tuple[Array | None, Array]:
    """Subjects (or None) and the mean of their standardised series."""
    values = np.asarray(brain_series, dtype=np.float64)
    if values.ndim != 3:
        return None, check_series("brain_series", values, n_volumes)
    checked = np.stack([check_series(f"brain_series of subject {i}", s, n_volumes) for i, s in enumerate(values)])
    return checked, group_mean(checked)


def group_mean(subjects: ArrayLike) -> Array:
    """Mean over subjects of their standardised series ``(S, T, R) -> (T, R)``; dead series are left out."""
    z = standardize(subjects)
    count = np.isfinite(z).sum(axis=0)
    return np.divide(np.nansum(z, axis=0), count, out=np.full(z.shape[1:], np.nan), where=count > 0)


def _unit(series: Array, dead: float = np.nan) -> Array:
    norm = np.linalg.norm(series, axis=0)
    return np.divide(series, norm, out=np.full_like(series, dead), where=norm > 1e-9)


def _clean(series: Array, basis: Array | None, dead: float = np.nan) -> Array:
    """Remove the nuisance and bring every column to norm 1; what the nuisance explains wholly is dead."""
    if basis is None:
        return _unit(series, dead)
    rest = series - basis @ (basis.T @ series)
    rest[:, np.linalg.norm(rest, axis=0) < 1e-6 * np.linalg.norm(series, axis=0)] = 0.0
    return _unit(rest, dead)


def _with_cosines(basis: Array | None, n_volumes: int, n_slow: int) -> Array | None:
    """The nuisance and the slow cosines, as one orthonormal basis."""
    if n_slow == 0:
        return basis
    slow = slow_cosines(n_volumes, n_slow + 1)
    return slow if basis is None else orthonormal(np.column_stack([slow[:, 1:], basis]), n_volumes)


def _lag_profile(x: Array, y: Array, lags: Sequence[int]) -> Array:
    """Correlation of x[t] with y[t + lag] over the volumes that both have."""
    n = len(x)
    profile = []
    for lag in lags:
        if abs(lag) > n - 3:
            raise InputError(f"lags: {lag} is too long for {n} volumes")
        a, b = x[max(-lag, 0) : n - max(lag, 0)], y[max(lag, 0) : n - max(-lag, 0)]
        profile.append(_unit(a - a.mean(axis=0)).T @ _unit(b - b.mean(axis=0)))
    return np.stack(profile) if profile else np.empty((0, x.shape[1], y.shape[1]))


def _names(parameter: str, names: Sequence[str] | None, count: int, word: str) -> list[str]:
    if names is None:
        return [f"{word}{i}" for i in range(count)]
    if len(names) != count:
        raise InputError(f"{parameter} has {len(names)} names for {count} series")
    return [str(name) for name in names]
