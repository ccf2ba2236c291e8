"""How concentrated and how alike sets of neurons are."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_option


def zscore_maps(maps: ArrayLike, *, skip_zeros: bool = False) -> NDArray[np.float32]:
    """Maps with zero mean and unit SD over neurons; a constant map becomes all zero (no neuron stands out).

    Parameters
    ----------
    maps : array ``(n_maps, n_neurons)``
    skip_zeros : bool
        Leave out neurons that are exactly 0: an ICA writes 0 where a neuron was masked, or outside a map's layers.

    Returns
    -------
    float32 array ``(n_maps, n_neurons)``
    """
    values = np.asarray(maps, dtype=np.float64)
    used = values != 0 if skip_zeros else np.ones(values.shape, dtype=bool)
    n = np.maximum(used.sum(axis=1, keepdims=True), 1)
    centred = np.where(used, values - values.sum(axis=1, keepdims=True, where=used) / n, 0)
    sd = np.sqrt((centred**2).sum(axis=1, keepdims=True) / n)
    # Rounding leaves a constant map with an SD of the order of the last bit of its mean: that is no spread.
    spread = sd > 1e-12 * np.abs(values).max(axis=1, keepdims=True)
    return np.divide(centred, sd, out=np.zeros_like(centred), where=spread).astype(np.float32)


def gini(values: ArrayLike) -> NDArray[np.float64]:
    """Gini index of ``|values|`` along the last axis: 0 all equal, ``1 - 1/n`` one value holds everything.

    Hurley and Rickard 2009, "Comparing measures of sparsity", eq. 13. An all-zero row gives nan.
    """
    x = np.sort(np.abs(np.asarray(values, dtype=np.float64)), axis=-1)
    n = x.shape[-1]
    total = x.sum(axis=-1)
    weighted = (x * (n - np.arange(1, n + 1) + 0.5) / n).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - 2 * weighted / total


def hoyer(values: ArrayLike) -> NDArray[np.float64]:
    """Hoyer sparseness ``(sqrt(n) - l1 / l2) / (sqrt(n) - 1)`` along the last axis: 0 all equal, 1 a single value.

    Hoyer 2004, "Non-negative matrix factorization with sparseness constraints". An all-zero row gives nan.
    """
    x = np.abs(np.asarray(values, dtype=np.float64))
    root = np.sqrt(x.shape[-1])
    with np.errstate(invalid="ignore", divide="ignore"):
        return (root - x.sum(axis=-1) / np.sqrt((x**2).sum(axis=-1))) / (root - 1)


def overlap_matrix(a: ArrayLike, b: ArrayLike, kind: str = "dice") -> NDArray[np.float64]:
    """Overlap of every mask of `a` with every mask of `b`.

    Parameters
    ----------
    a, b : bool arrays ``(n_a, n_neurons)``, ``(n_b, n_neurons)``
    kind : {"dice", "iou"}
        ``2 |A and B| / (|A| + |B|)`` or ``|A and B| / |A or B|``.

    Returns
    -------
    float64 array ``(n_a, n_b)``; nan where both masks are empty.
    """
    check_option("kind", kind, ("dice", "iou"))
    first, second = (np.atleast_2d(np.asarray(m, dtype=bool)) for m in (a, b))
    if first.shape[1] != second.shape[1]:
        raise InputError(f"masks cover {first.shape[1]} and {second.shape[1]} neurons: they must be the same neurons")
    both = first.astype(np.float64) @ second.T.astype(np.float64)
    sizes = first.sum(axis=1)[:, None] + second.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return 2 * both / sizes if kind == "dice" else both / (sizes - both)
