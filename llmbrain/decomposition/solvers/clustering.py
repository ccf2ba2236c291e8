"""Rivals of an ICA: groups of neurons by k-means, and parts by semi-nonnegative matrix factorization."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import KMeans

from llmbrain.decomposition.prepare.pca import Whitened
from llmbrain.decomposition.solvers.result import Unmixed

STARTS = 4  # of k-means
STEPS = 500  # of the factorization, at most
TOLERANCE = 1e-4  # it ends where a step lowers the error by a smaller share


def cluster_maps(
    group: Whitened, live: torch.Tensor, random_state: np.random.RandomState
) -> tuple[torch.Tensor, Unmixed]:
    """k-means of neurons by their time courses in the group's subspace; sign and size of a time course do not count.

    A map tells how much of each neuron's variance-scaled activity runs along its cluster's mean direction; that is all
    neurons, so that a cut-off (not the cluster's border) says what belongs to the network. Neurons that do the opposite
    of a cluster are in another one.

    Returns
    -------
    maps : Tensor (k, n_neurons)
    """
    rows, used = _scaled(group, live)
    points = rows.T / np.maximum(np.linalg.norm(rows, axis=0)[:, None], 1e-12)
    found = KMeans(len(rows), n_init=STARTS, random_state=random_state.randint(2**31 - 1)).fit(points)
    centers = found.cluster_centers_
    centers = centers / np.maximum(np.linalg.norm(centers, axis=1, keepdims=True), 1e-12)
    return _placed(group, used, centers @ rows), Unmixed(np.eye(len(rows)), int(found.n_iter_), True)


def part_maps(group: Whitened, live: torch.Tensor, random_state: np.random.RandomState) -> tuple[torch.Tensor, Unmixed]:
    """Semi-nonnegative matrix factorization (Ding, Li & Jordan 2010): maps without negative weights.

    Signals have both signs, so that plain NMF does not apply: time courses may be negative here, maps may not. Starts
    from k-means.

    Returns
    -------
    maps : Tensor (k, n_neurons)
    """
    rows, used = _scaled(group, live)
    k = len(rows)
    points = rows.T / np.maximum(np.linalg.norm(rows, axis=0)[:, None], 1e-12)
    labels = KMeans(k, n_init=1, random_state=random_state.randint(2**31 - 1)).fit_predict(points)
    maps = np.eye(k)[labels] + 0.2  # as in the publication
    total, before, steps, change = float((rows**2).sum()), np.inf, 0, np.inf
    while steps < STEPS and change >= TOLERANCE:
        steps += 1
        factors = np.linalg.lstsq(maps.T @ maps, maps.T @ rows.T, rcond=None)[0]  # (k, k): a row a part
        along, inner = rows.T @ factors.T, factors @ factors.T
        up = np.maximum(along, 0) + maps @ np.maximum(-inner, 0)
        down = np.maximum(-along, 0) + maps @ np.maximum(inner, 0)
        maps *= np.sqrt(up / np.maximum(down, 1e-12))
        error = float(((rows.T - maps @ factors) ** 2).sum()) / total
        change = (before - error) / max(error, 1e-12)
        before = error
    return _placed(group, used, maps.T), Unmixed(np.eye(k), steps, change < TOLERANCE, float(change))


def _scaled(group: Whitened, live: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of live neurons, as long as their singular values ``(k, n_live)``, and which those are."""
    used = live.cpu().numpy()
    k = len(group.data)
    rows = (group.data * group.eigenvalues[:k].sqrt()[:, None].to(group.data)).cpu().numpy()[:, used]
    return rows.astype(np.float64), used


def _placed(group: Whitened, used: np.ndarray, maps: np.ndarray) -> torch.Tensor:
    """Maps over all neurons, 0 on dead ones."""
    out = torch.zeros((len(maps), used.size), dtype=group.data.dtype)
    out[:, torch.from_numpy(used)] = torch.from_numpy(np.ascontiguousarray(maps)).to(out)
    return out.to(group.data.device)
