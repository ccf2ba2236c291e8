"""Similarity of two sets of series as wholes: debiased CKA and RSA, without what neighbours in time share anyway."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from llmbrain._validation import InputError, check_option, check_whole, seed_of
from llmbrain.brains.series import check_series, orthonormal, slow_cosines, standardize
from llmbrain.comparison.imputation import imputation
from llmbrain.stats.nulls import NULLS, missing_cosines, surrogates, warn_if_too_smooth

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
MEASURES = ("cka", "rsa")
RSA_DISTANCES = ("correlation", "euclidean")


@dataclass
class Similarity:
    """A similarity with its null.

    Attributes
    ----------
    value : float
    p : float
        ``(b + 1) / (n + 1)``, one-sided: more similar than series that were moved in time.
    null : array ``(n_permutations,)``
    measure : str
    """

    value: float
    p: float
    null: Array
    measure: str


def allowed_pairs(n_volumes: int, exclude: int) -> Mask:
    """Pairs of volumes that are more than `exclude` apart (0: all but the diagonal), as a square mask."""
    check_whole("exclude", exclude, 0, n_volumes - 4)
    index = np.arange(n_volumes)
    return np.abs(index[:, None] - index) > exclude


def debiased_cka(x: ArrayLike, y: ArrayLike, *, exclude: int = 0) -> float:
    """Linear centred kernel alignment, debiased, on pairs of volumes that are far enough apart.

    Both Gram matrices lose the part that a row effect plus a column effect explains on the allowed pairs; the result is
    the cosine of what is left. With ``exclude=0`` (only the diagonal is left out) this is the ratio of unbiased HSIC
    estimates (Song et al. 2012, equation 5); plain CKA rises towards 1 when there are more features than volumes.

    Parameters
    ----------
    x, y : arrays ``(T, F)`` and ``(T, G)``
    exclude : int
        Leave out pairs of volumes up to so many apart.

    Returns
    -------
    float
        About 0 for unrelated, 1 for the same up to rotation and scale; may be slightly negative.
    """
    a, b = _pair(x, y)
    mask = allowed_pairs(len(a), exclude)
    centre = _Centring(mask)
    return _cosine(centre(a @ a.T), centre(b @ b.T))


class _Centring:
    """Residual of a symmetric matrix after ``effect_i + effect_j``, by least squares on the pairs of a mask."""

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        normal = mask.astype(np.float64)
        normal[np.diag_indices_from(normal)] += mask.sum(axis=1)
        self.inverse = np.linalg.pinv(normal, hermitian=True)

    def __call__(self, gram: Array) -> Array:
        inside = np.where(self.mask, gram, 0.0)
        effect = self.inverse @ inside.sum(axis=1)
        return np.where(self.mask, inside - effect[:, None] - effect, 0.0)


def rsa(x: ArrayLike, y: ArrayLike, *, exclude: int = 0, distance: str = "correlation") -> float:
    """Representational similarity: Spearman correlation of two dissimilarity matrices over pairs of volumes.

    Parameters
    ----------
    x, y : arrays ``(T, F)`` and ``(T, G)``
        Each volume is one pattern; at least two columns for the correlation distance. Columns are standardised first.
    exclude : int
        Leave out pairs of volumes up to so many apart (10 s are usual).
    distance : {"correlation", "euclidean"}

    Returns
    -------
    float
    """
    a, b = _pair(x, y)
    pairs = np.triu(allowed_pairs(len(a), exclude), 1)
    return _cosine(_ranks(_distances(a, distance)[pairs]), _ranks(_distances(b, distance)[pairs]))


def _distances(x: Array, distance: str) -> Array:
    check_option("distance", distance, RSA_DISTANCES)
    if distance == "correlation":
        if x.shape[1] < 3:
            raise InputError(
                f"distance='correlation' needs at least 3 columns, there are {x.shape[1]}: use 'euclidean'"
            )
        rows = x - x.mean(axis=1, keepdims=True)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(float).tiny)
        return 1.0 - rows @ rows.T
    squares = (x**2).sum(axis=1)
    return np.sqrt(np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0.0))


def compare_similarity(
    x: ArrayLike,
    y: ArrayLike,
    *,
    measure: str = "cka",
    exclude: int = 5,
    distance: str = "correlation",
    null: str = "circular",
    n_permutations: int | None = 200,
    min_shift: int = 10,
    nuisance: ArrayLike | None = None,
    random_state: int | None = 0,
) -> Similarity:
    """CKA or RSA of two sets of series, with the null of `couple`: `x` moved in time as a whole.

    Parameters
    ----------
    x, y : arrays ``(T, F)`` and ``(T, G)``
        Columns are standardised; dead columns are left out.
    measure : {"cka", "rsa"}
    exclude : int
        Pairs of volumes up to so many apart are left out: 10 s over TR.
    null, n_permutations, min_shift
        See `couple`.
    nuisance : array ``(T, C)``, optional
        Regressed out of both sides, and of every surrogate; see `couple`.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.

    Returns
    -------
    Similarity
    """
    check_option("measure", measure, MEASURES)
    check_option("null", null, NULLS)
    random_state = seed_of(random_state)
    a, b = _pair(x, y)
    n_slow = missing_cosines(a, b)
    basis = None if nuisance is None else orthonormal(nuisance, len(a))
    if basis is not None:
        a, b = _pair(a - basis @ (basis.T @ a), b - basis @ (basis.T @ b))
    warn_if_too_smooth(null, a, b)
    mask = allowed_pairs(len(a), exclude)
    describe = _describer(measure, mask, distance)
    other = describe(b)
    value = _cosine(describe(a), other)
    lost = slow_cosines(len(a), n_slow + 1)
    if basis is not None:
        lost = orthonormal(np.column_stack([lost[:, 1:], basis[:, 1:]]) if n_slow else basis[:, 1:], len(a))
    settings: dict[str, Any] = {"n_permutations": n_permutations, "min_shift": min_shift, "n_slow": n_slow}
    fill = None if basis is None else imputation(a, basis, n_slow).draw
    draws = []
    for moved in surrogates(a, null, fill=fill, random_state=random_state, **settings):
        again = standardize(moved - lost @ (lost.T @ moved)) if n_slow or basis is not None else moved
        draws.append(_cosine(describe(again), other))
    reached = np.array(draws) >= value
    return Similarity(value, float((1 + reached.sum()) / (1 + len(draws))), np.array(draws), measure)


def _describer(measure: str, mask: Mask, distance: str) -> Callable[[Array], Array]:
    """From series to what is compared by its cosine."""
    if measure == "cka":
        centre = _Centring(mask)
        return lambda series: centre(series @ series.T)
    pairs = np.triu(mask, 1)
    return lambda series: _ranks(_distances(series, distance)[pairs])


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    a = check_series("x", x)
    b = check_series("y", y, len(a))
    ready = []
    for name, values in (("x", a), ("y", b)):
        z = standardize(values)
        z = z[:, np.isfinite(z).all(axis=0)]
        if not z.shape[1]:
            raise InputError(f"{name}: every series is constant or NaN")
        ready.append(z)
    return ready[0], ready[1]


def _ranks(values: Array) -> Array:
    ranks = rankdata(values)
    return ranks - ranks.mean()


def _cosine(a: Array, b: Array) -> float:
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / norm) if norm > 0 else float("nan")
