"""How sure is a mean: percentile bootstrap."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def bootstrap_mean(values: ArrayLike, n: int, level: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Percentile interval of the mean over the first axis, when its entries are drawn again with replacement.

    Parameters
    ----------
    values : array ``(n_items, ...)``
        NaN are left out of every mean.
    n : int
        Draws; all columns see the same ones.
    level : float
        Such as .95.

    Returns
    -------
    low, high : arrays ``(...)``
        NaN for fewer than two items, or where a column has no number.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        nothing = np.full(values.shape[1:], np.nan)[()]
        return nothing, nothing
    drawn = rng.integers(len(values), size=(n, len(values)))
    known = np.isfinite(values)
    if known.all():
        means = values[drawn].mean(axis=1)
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high
    count = known[drawn].sum(axis=1)
    means = np.where(known, values, 0.0)[drawn].sum(axis=1) / np.where(count > 0, count, np.nan)
    low, high = (np.full(values.shape[1:], np.nan) for _ in range(2))
    some = known.any(axis=0)
    low[some], high[some] = np.nanquantile(means[:, some], [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
