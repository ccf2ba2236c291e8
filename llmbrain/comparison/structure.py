"""Structure without shared time: are two brains, of whatever kind, wired and loaded alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_count, seed_of
from llmbrain.brains.series import check_series, standardize
from llmbrain.networks.graphs import graph_measures
from llmbrain.stats import PUBLISHED_Z
from llmbrain.stats.sparsity import hoyer

Array = NDArray[np.float64]


def compare_structure(
    a: ArrayLike,
    b: ArrayLike,
    *,
    densities: Sequence[float] = (0.1, 0.15, 0.2),
    n_permutations: int = 100,
    n_samples: int = 10,
    n_seeds: int = 20,
    random_state: int | None = 0,
) -> pd.DataFrame:
    """Graph measures of the connectivity of two sets of series, which need not share time.

    Both are brought to the same number of nodes: of the larger set, `n_samples` random subsets of the smaller one's
    size are measured and averaged. Graphs are binary, positive, of equal density; see `llmbrain.networks.graphs` for
    the measures and their null graphs. Raw values depend on size and density: compare the normalized ones.

    Parameters
    ----------
    a, b : arrays ``(T, K)`` and ``(U, R)``
        Time courses of networks, of regions; at least 10 of each. Dead columns are left out.
    n_permutations : int
        Null draws.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.

    Returns
    -------
    DataFrame
        One row a side ("a" or "b"), density and measure: ``side``, ``n_nodes``, ``density``, ``measure``, ``value`` and
        ``normalized`` (by rewired graphs).
    """
    check_count("n_samples", n_samples, 1)
    random_state = seed_of(random_state)
    matrices = []
    for name, series in (("a", a), ("b", b)):
        z = standardize(check_series(name, series))
        z = z[:, np.isfinite(z).all(axis=0)]
        if z.shape[1] < 10:
            raise InputError(f"{name} has {z.shape[1]} live series: at least 10 are needed for a graph")
        matrices.append(z.T @ z / len(z))
    n = min(len(m) for m in matrices)
    rng = np.random.default_rng(random_state)
    rows = []
    for side, matrix in zip("ab", matrices):
        whole = len(matrix) == n
        picks = [np.arange(n)] if whole else [rng.choice(len(matrix), n, replace=False) for _ in range(n_samples)]
        measured = [
            graph_measures(
                matrix[np.ix_(pick, pick)],
                densities,
                n_permutations=n_permutations,
                n_seeds=n_seeds,
                random_state=random_state + i,
            )
            for i, pick in enumerate(picks)
        ]
        mean = pd.concat(measured).groupby(["density", "measure"], sort=False)[["value", "normalized"]].mean()
        rows.append(mean.reset_index().assign(side=side, n_nodes=n))
    return pd.concat(rows, ignore_index=True)[["side", "n_nodes", "density", "measure", "value", "normalized"]]


def sparsity(maps: ArrayLike, *, threshold: float = PUBLISHED_Z) -> pd.DataFrame:
    """How concentrated each map is, as fractions of the units, so that a model and a brain can be put side by side.

    Parameters
    ----------
    maps : array ``(K, n_units)``

    Returns
    -------
    DataFrame
        ``share`` of units beyond the threshold (z over units) and ``hoyer`` (0: all equal, 1: a single unit; Hoyer
        2004).
    """
    values = np.atleast_2d(np.asarray(maps, dtype=np.float64))
    if values.shape[1] < 2 or not np.isfinite(values).all():
        raise InputError(f"maps of shape {values.shape} must be finite, with at least 2 units")
    return pd.DataFrame({"share": (np.abs(standardize(values.T).T) > threshold).mean(axis=1), "hoyer": hoyer(values)})


def spectral_slope(series: ArrayLike) -> Array:
    """Exponent of ``1 / f ** slope`` of every series: white noise 0, a random walk about 2.

    Least squares on the logarithms of Welch's spectrum without its first and last bin; independent of the unit of
    time, so tokens and volumes can be compared.
    """
    from scipy.signal import welch

    z = standardize(check_series("series", series))
    frequencies, power = welch(z, axis=0, nperseg=min(len(z), max(32, len(z) // 4)))
    x = np.log(frequencies[1:-1])
    y = np.log(power[1:-1])
    x = x - x.mean()
    return -(x @ (y - y.mean(axis=0))) / (x @ x)
