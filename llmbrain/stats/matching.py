"""One-to-one matching of component maps."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment

from llmbrain._validation import InputError


def correlate_rows(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Pearson r of every row of `a` with every row of `b`; shape ``(rows of a, rows of b)``; a constant row gives 0."""
    rows = []
    for x in (a, b):
        x = np.atleast_2d(np.asarray(x, dtype=np.float64))
        x = x - x.mean(axis=1, keepdims=True)
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        rows.append(np.divide(x, norm, out=np.zeros_like(x), where=norm > 0))
    if rows[0].shape[1] != rows[1].shape[1]:
        raise InputError(f"maps cover {rows[0].shape[1]} and {rows[1].shape[1]} neurons: they must be the same neurons")
    return rows[0] @ rows[1].T


def best_pairs(r: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the one-to-one pairing with the largest sum of ``|r|`` (Hungarian method); NaN counts 0."""
    rows, columns = linear_sum_assignment(-np.abs(np.nan_to_num(np.asarray(r, dtype=np.float64))))
    return rows, columns


def match_maps(estimate: ArrayLike, reference: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pair each reference map with one estimated map, so that the sum of ``|r|`` is largest (Hungarian method).

    Parameters
    ----------
    estimate : array ``(n_estimates, n_neurons)``
    reference : array ``(n_references, n_neurons)``

    Returns
    -------
    index : int array ``(n_references,)``
        Row of `estimate` for each reference; -1 where there are fewer estimates than references.
    r : array ``(n_references,)``
        Signed Pearson correlation of the pair; 0 where there is none.
    """
    r = correlate_rows(estimate, reference)
    rows, columns = best_pairs(r)
    index = np.full(r.shape[1], -1)
    index[columns] = rows
    matched = np.zeros(r.shape[1])
    matched[columns] = r[rows, columns]
    return index, matched
