"""Back-reconstruction as the GIFT toolbox does it: run maps and time courses from the reductions themselves.

`dual_regression` is the better default: it needs nothing but maps. These are for those who compare with GIFT; they work
in float64 throughout, and keep every reduced run in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_option
from llmbrain.decomposition.solvers.fastica import fastica
from llmbrain.scanning.inputs import Runs

Array = NDArray[np.float64]
KINDS = ("gica3", "gica", "regular")


@dataclass(frozen=True)
class Reduction:
    """A PCA by the covariance over neurons (divisor ``n_neurons - 1``), of centred rows.

    Attributes
    ----------
    whitening : array ``(n_components, n_rows)``
    dewhitening : array ``(n_rows, n_components)``
    scores : array ``(n_components, n_neurons)``
        ``whitening @ rows``: unit variance (ddof 1), uncorrelated.
    eigenvalues : array ``(n_components,)``, falling
    """

    whitening: Array
    dewhitening: Array
    scores: Array
    eigenvalues: Array


@dataclass(frozen=True)
class BackReconstruction:
    """What `back_reconstruct` returns.

    Attributes
    ----------
    components : array ``(n_components, n_neurons)``
        The group's sources S.
    maps : array ``(n_runs, n_components, n_neurons)``
    time_courses : list of array ``(n_tokens, n_components)``
    unmixing : array ``(n_components, n_components)``
    """

    components: Array
    maps: Array
    time_courses: list[Array]
    unmixing: Array


def remove_token_means(data: ArrayLike) -> Array:
    """Data ``(n_tokens, n_neurons)`` without each token's mean over neurons: GIFT's default preprocessing."""
    data = np.asarray(data, dtype=np.float64)
    return data - data.mean(axis=1, keepdims=True)


def reduce_rows(rows: ArrayLike, n_components: int) -> Reduction:
    """PCA of ``(n_rows, n_neurons)`` rows that are centred over neurons.

    Raises
    ------
    InputError
        If the rows have a lower rank than `n_components`.
    """
    rows = np.asarray(rows, dtype=np.float64)
    values, vectors = np.linalg.eigh(rows @ rows.T / (rows.shape[1] - 1))
    values, vectors = values[::-1], vectors[:, ::-1]
    rank = int((values > len(values) * np.finfo(np.float64).eps * values[0]).sum())
    if not 1 <= n_components <= rank:
        raise InputError(f"n_components={n_components} must be between 1 and {rank}, the rank of the data")
    root = np.sqrt(values[:n_components])
    whitening = (vectors[:, :n_components] / root).T
    return Reduction(whitening, vectors[:, :n_components] * root, whitening @ rows, values[:n_components])


def back_reconstruct(
    scans: Any,
    n_components: int = 20,
    *,
    n_run_components: int | None = None,
    kind: str = "gica3",
    unmixing: ArrayLike | None = None,
    random_state: int | None = 0,
    mask_img: Any = None,
) -> BackReconstruction:
    """Group ICA in GIFT's steps, and each run's share of it.

    Parameters
    ----------
    scans : sequence of runs, or one
        As for `dual_regression`. Each token's mean over neurons is removed, nothing else: neurons keep their means and
        scales, as in GIFT's default.
    n_components : int
        Components of the group.
    n_run_components : int, optional
        Components kept of each run; default 1.5 times `n_components`, at most ``n_tokens - 1``.
    kind : {"gica3", "gica", "regular"}
        Back-reconstruction. Maps of "regular" and "gica3" sum over runs to the components; "gica" and "gica3" give the
        same product of time courses and maps, which is the data in the kept subspace.
    unmixing : array ``(n_components, n_components)``, optional
        W of an ICA done elsewhere on the same reduced data; default: FastICA.
    random_state : int or None
        Start of FastICA.
    mask_img : NIfTI image or path, optional
        Brain mask, for fMRI images.

    Returns
    -------
    BackReconstruction

    Notes
    -----
    Erhardt et al. 2011, Human Brain Mapping 32:2075, table 1. With one run there is no second reduction.
    """
    check_option("kind", kind, KINDS)
    runs = Runs(scans, mask_img=mask_img)
    reductions = []
    for i, data in enumerate(runs):
        size = n_run_components or min(round(1.5 * n_components), len(data) - 1)
        if size < n_components:
            raise InputError(f"n_run_components={size} of {runs.name(i)} is below n_components={n_components}")
        reductions.append(reduce_rows(remove_token_means(data), n_components if len(runs) == 1 else size))
    stacked = np.concatenate([r.scores for r in reductions])
    if len(reductions) == 1:
        group = Reduction(np.eye(n_components), np.eye(n_components), stacked, np.ones(n_components))
    else:
        group = reduce_rows(stacked, n_components)
    w = fastica(group.scores, random_state=random_state).unmixing if unmixing is None else np.asarray(unmixing, float)
    if w.shape != (n_components, n_components):
        raise InputError(f"unmixing has shape {w.shape}, expected {(n_components, n_components)}")
    mixing = np.linalg.pinv(w)

    bounds = np.cumsum([0, *(len(r.scores) for r in reductions)])
    maps, courses = [], []
    for run, start, stop in zip(reductions, bounds, bounds[1:]):
        forward, backward = group.whitening[:, start:stop], group.dewhitening[start:stop]
        maps.append(w @ (np.linalg.pinv(backward) if kind == "gica" else forward) @ run.scores)
        courses.append(run.dewhitening @ (np.linalg.pinv(forward) if kind == "gica3" else backward) @ mixing)
    return BackReconstruction(w @ group.scores, np.array(maps), courses, w)
