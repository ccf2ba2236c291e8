"""Are components real? Repeats of ICA from new starts and new samples, clustered (ICASSO), and halves of the runs.

Runs are reduced once; a repeat only resamples tokens within the reduced space and unmixes again. A component that comes
back every time is stable, which is not the same as true: see `ica_stability`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform

from llmbrain._validation import InputError, check_count, check_option, check_range, check_whole, legacy_generator
from llmbrain.decomposition.group_space import GroupSpace
from llmbrain.decomposition.workers import workers

if TYPE_CHECKING:
    from llmbrain.anatomy.space import NeuronSpace

Array = NDArray[np.float64]
RESAMPLE = ("both", "starts", "bootstrap")


class UnstableComponentsWarning(UserWarning):
    """Components that depend on the random start or on which tokens were seen."""


@dataclass(frozen=True)
class Stability:
    """What `ica_stability` returns; clusters are in order of falling `iq`.

    Attributes
    ----------
    maps : array ``(n_components, n_neurons)``
        The centrotype of each cluster: the estimate most similar to the rest of it. Same units and sign as
        ``GroupICA.components_``.
    iq : array ``(n_components,)``
        Mean similarity inside the cluster minus mean similarity to the outside; 1 is perfect; NaN for a cluster of one.
    iq_strict : array
        Smallest similarity inside minus largest to the outside.
    recovered : array
        Share of the repeats that have an estimate in the cluster.
    sizes : int array
        Estimates in the cluster; as many as repeats when each gives one.
    r_index : float
        Mean over clusters of the distance inside, divided by the distance to the nearest cluster; small is good.
    similarity : array ``(n_estimates, n_estimates)``
        ``|r|`` of all estimates; rows are repeat by repeat, ``n_components`` each.
    labels : int array ``(n_estimates,)``
        Cluster of each estimate.
    converged : float
        Share of the repeats whose ICA converged.
    space : NeuronSpace or None
    n_iter : int array ``(n_starts,)``
        Steps of each repeat.
    """

    maps: NDArray[Any]
    iq: Array
    iq_strict: Array
    recovered: Array
    sizes: NDArray[np.int64]
    r_index: float
    similarity: Array
    labels: NDArray[np.int64]
    converged: float
    space: NeuronSpace | None = None
    n_iter: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def to_frame(self) -> pd.DataFrame:
        """One row a component: iq, iq_strict, recovered, size."""
        columns = {"iq": self.iq, "iq_strict": self.iq_strict, "recovered": self.recovered, "size": self.sizes}
        return pd.DataFrame(columns).rename_axis("component")

    def __repr__(self) -> str:
        return (
            f"Stability({len(self.iq)} components, median Iq {np.nanmedian(self.iq):.2f}, min {np.nanmin(self.iq):.2f})"
        )


def ica_stability(
    scans: Any,
    n_components: int = 20,
    *,
    n_starts: int = 20,
    resample: str = "both",
    threshold: float = 0.8,
    n_subspace: int | None = None,
    random_state: int | np.random.Generator | np.random.RandomState | None = 0,
    **options: Any,
) -> Stability:
    """Repeat group ICA and see which components come back (ICASSO).

    Parameters
    ----------
    scans : sequence of runs
        As for `GroupICA.fit`; read twice, whatever the number of repeats.
    n_components : int
    n_starts : int
        Repeats, at least 2; ten or more are advisable.
    resample : {"both", "starts", "bootstrap"}
        What differs between repeats: the random start, the sample (runs, and tokens within them, drawn with
        replacement), or both.
    threshold : float
        Components with a lower Iq are named in an `UnstableComponentsWarning`.
    n_subspace : int, optional
        Dimensions of the group space in which samples are drawn; default twice `n_components`. Variance outside it
        does not vary between samples.
    random_state : int, RandomState or None
    **options
        Further parameters of `GroupICA`: preprocessing, ``method``, ``fun``, ``device`` and so on.

    Returns
    -------
    Stability

    Warns
    -----
    UnstableComponentsWarning

    Notes
    -----
    Himberg, Hyvärinen & Esposito 2004, NeuroImage 22:1214; Iq as in icasso 1.22: without similarity of an estimate with
    itself. **High stability is not truth**: on phantoms with little data all components can have an Iq of 1 from new
    starts while none matches a source, because all repeats share one sample; `split_half_reproducibility` sees
    that.
    """
    check_count("n_starts", n_starts, 2)
    check_option("resample", resample, RESAMPLE)
    check_range("threshold", threshold, -1, 1)
    _check_cca(resample, options)
    check_whole("n_components", n_components, 1)
    size = 2 * n_components if n_subspace is None else check_whole("n_subspace", n_subspace, 1)
    reduced = GroupSpace.of(scans, n_components, size, options, tokens=resample != "starts")
    result = _icasso(reduced, n_components, n_starts, resample, random_state)
    low = np.flatnonzero(~(result.iq >= threshold))
    if len(low):
        named = ", ".join(f"{k} ({result.iq[k]:.2f})" for k in low)
        warnings.warn(
            f"{len(low)} of {n_components} components are unstable, Iq below {threshold}: {named}. They depend on the "
            "random start or the sample: use more tokens or runs, or fewer components, and do not interpret these",
            UnstableComponentsWarning,
            stacklevel=2,
        )
    return result


def model_order_sweep(
    scans: Any,
    orders: Sequence[int] = (5, 10, 20, 40),
    *,
    n_starts: int = 10,
    resample: str = "both",
    threshold: float = 0.8,
    random_state: int | None = 0,
    **options: Any,
) -> pd.DataFrame:
    """ICASSO for several numbers of components; a table to choose from, no choice.

    Parameters
    ----------
    scans, n_starts, resample, threshold, random_state, **options
        As for `ica_stability`; runs are reduced once for all orders.
    orders : sequence of int

    Returns
    -------
    DataFrame
        One row an order: ``n_components``, ``iq_median``, ``iq_min``, ``n_stable`` (Iq at least `threshold`),
        ``share_stable``, ``recovered_min``, ``r_index``, ``converged``.
    """
    if not len(orders):
        raise InputError("orders is empty: pass at least one number of components")
    check_count("n_starts", n_starts, 2)
    check_option("resample", resample, RESAMPLE)
    _check_cca(resample, options)
    reduced = GroupSpace.of(scans, max(orders), 2 * max(orders), options, tokens=resample != "starts")
    rows = []
    for order in orders:
        found = _icasso(reduced, order, n_starts, resample, random_state)
        stable = int((found.iq >= threshold).sum())
        rows.append(
            {
                "n_components": order,
                "iq_median": float(np.nanmedian(found.iq)),
                "iq_min": float(np.nanmin(found.iq)),
                "n_stable": stable,
                "share_stable": stable / order,
                "recovered_min": float(found.recovered.min()),
                "r_index": found.r_index,
                "converged": found.converged,
            }
        )
    return pd.DataFrame(rows)


def _check_cca(resample: str, options: dict[str, Any]) -> None:
    if options.get("cca") and resample != "starts":
        raise InputError("cca=True gives runs other weights than a bootstrap of tokens can: use resample='starts'")


def cluster_quality(similarity: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """Iq and strict Iq of each cluster, in order of label.

    Parameters
    ----------
    similarity : array ``(n, n)``, symmetric
    labels : array ``(n,)``

    Returns
    -------
    iq, iq_strict : arrays ``(n_clusters,)``
        Mean (smallest) similarity of different members, minus mean (largest) similarity of members to others. NaN for a
        cluster of one; with a single cluster, nothing is subtracted.
    """
    similarity, labels = np.asarray(similarity, dtype=np.float64), np.asarray(labels)
    if similarity.shape != (len(labels), len(labels)):
        raise InputError(f"similarity has shape {similarity.shape} for {len(labels)} labels")
    mean, strict = [], []
    for label in np.unique(labels):
        inside = labels == label
        within = similarity[np.ix_(inside, inside)][np.triu_indices(inside.sum(), 1)]
        across = similarity[np.ix_(inside, ~inside)]
        if not within.size:
            mean.append(np.nan)
            strict.append(np.nan)
            continue
        mean.append(within.mean() - (across.mean() if across.size else 0))
        strict.append(within.min() - (across.max() if across.size else 0))
    return np.array(mean), np.array(strict)


def r_index(similarity: ArrayLike, labels: ArrayLike) -> float:
    """Mean over clusters of mean distance inside / mean distance to the nearest cluster (distance is 1 - similarity).

    Clusters of one have no inside, and are left out; NaN if no cluster is left, or there is only one.
    """
    distance, labels = 1 - np.asarray(similarity, dtype=np.float64), np.asarray(labels)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    ratios = []
    for i, own in enumerate(members):
        others = [distance[np.ix_(own, other)].mean() for j, other in enumerate(members) if j != i]
        if len(own) > 1 and others:
            inside = distance[np.ix_(own, own)][np.triu_indices(len(own), 1)].mean()
            ratios.append(inside / min(others))
    return float(np.mean(ratios)) if ratios else float("nan")


def _icasso(reduced: GroupSpace, n_components: int, n_starts: int, resample: str, random_state: Any) -> Stability:
    generator = legacy_generator(random_state)
    seed = generator.randint(2**31 - 1)
    sample = None if resample == "starts" else generator
    repeats = []
    with workers(reduced.basis.device):
        for _ in range(n_starts):
            start = np.random.RandomState(seed) if resample == "bootstrap" else generator
            repeats.append(reduced.repeat(n_components, start=start, sample=sample))
    estimates = np.concatenate([coordinates for coordinates, _, _ in repeats])
    similarity = np.minimum(np.abs(estimates @ estimates.T), 1)
    np.fill_diagonal(similarity, 1)
    labels = _clusters(similarity, n_components)
    iq, strict = cluster_quality(similarity, labels)
    order = np.argsort(-np.nan_to_num(iq, nan=-2), kind="stable")
    labels = np.argsort(order)[labels]
    members = [np.flatnonzero(labels == k) for k in range(n_components)]
    centres = [own[similarity[np.ix_(own, own)].sum(axis=1).argmax()] for own in members]
    return Stability(
        maps=reduced.maps(estimates[centres]),
        iq=iq[order],
        iq_strict=strict[order],
        recovered=np.array([len(np.unique(own // n_components)) for own in members]) / n_starts,
        sizes=np.array([len(own) for own in members]),
        r_index=r_index(similarity, labels),
        similarity=similarity,
        labels=labels,
        converged=float(np.mean([converged for _, converged, _ in repeats])),
        space=reduced.space,
        n_iter=np.array([steps for _, _, steps in repeats], dtype=np.int64),
    )


def _clusters(similarity: Array, n_clusters: int) -> NDArray[np.int64]:
    """Average linkage, cut into `n_clusters`; labels from 0, every one used."""
    if n_clusters == 1:
        return np.zeros(len(similarity), dtype=np.int64)
    tree = linkage(squareform(1 - similarity, checks=False), method="average")
    return cut_tree(tree, n_clusters=n_clusters).ravel().astype(np.int64)
