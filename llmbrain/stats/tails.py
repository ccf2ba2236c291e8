"""From statistics to probabilities and z, and from many probabilities to few: exact in both tails."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaln, ndtri_exp, stdtr
from scipy.stats import false_discovery_control

Array = NDArray[np.float64]
_SMALLEST = 1e-290  # below this a tail probability loses digits, and its logarithm is computed instead
_STEPS = 300  # of a continued fraction that needs 10 to 100


def t_to_z(t: ArrayLike, df: ArrayLike) -> Array:
    """The z with the same tail probability as `t` has with `df` degrees of freedom.

    The smaller tail is used on either side, by its logarithm where it underflows: t = 400 with 500 degrees of freedom
    has a tail of 10 ** -628 and gives z = 53.7.

    Parameters
    ----------
    t : array
    df : float or array that broadcasts with `t`
        Above 0.

    Returns
    -------
    float64 array of the common shape; NaN where `t` is NaN
    """
    t, df = np.broadcast_arrays(np.asarray(t, dtype=np.float64), np.asarray(df, dtype=np.float64))
    tail = np.asarray(stdtr(df, -np.abs(t)))
    far = tail < _SMALLEST
    with np.errstate(divide="ignore"):
        log_tail = np.asarray(np.log(tail))
    if far.any():
        log_tail[far] = _log_tail(np.abs(t[far]), df[far])
    return np.copysign(-ndtri_exp(log_tail), t)


def _log_tail(t: Array, df: Array) -> Array:
    """Logarithm of P(T > t) far in the tail, by a continued fraction of the incomplete beta function (DLMF 8.17.22)."""
    with np.errstate(divide="ignore"):
        log_odds = 2 * np.log(t) - np.log(df)  # of t**2 : df
    log_x, log_rest = -np.logaddexp(0, log_odds), -np.logaddexp(0, -log_odds)
    a, b, x = df / 2, 0.5, np.exp(log_x)
    c, d = np.ones_like(x), 1 / (1 - (a + b) / (a + 1) * x)  # Lentz's method
    fraction = d.copy()
    for m in range(1, _STEPS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        before = fraction.copy()
        for term in (even, odd):
            d, c = 1 / (1 + term * d), 1 + term / c
            fraction *= c * d
        if np.allclose(fraction, before, rtol=1e-15, atol=0):
            break
    return a * log_x + b * log_rest - np.log(a) - betaln(a, b) + np.log(fraction) - np.log(2)


def permutation_p(observed: ArrayLike, exceeded: ArrayLike, n_permutations: int) -> Array:
    """``(b + 1) / (n + 1)``, with b the draws that reach the observed value; NaN where there is no observation.

    Parameters
    ----------
    observed : array
        Only its NaN are read.
    exceeded : array
        Number of null draws at least as extreme.
    n_permutations : int
        Number of null draws.
    """
    p = (np.asarray(exceeded) + 1.0) / (n_permutations + 1.0)
    return np.where(np.isnan(np.asarray(observed, dtype=np.float64)), np.nan, p)


def benjamini_hochberg(p: ArrayLike) -> Array:
    """False discovery rate of Benjamini and Hochberg (1995), over all p of an array of any shape; NaN stay NaN."""
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    known = ~np.isnan(values)
    if known.any():
        adjusted[known] = false_discovery_control(values[known])
    return adjusted
