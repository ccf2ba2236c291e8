"""Functional network connectivity: which networks are active together, when, and along which layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_count, check_option, check_whole
from llmbrain.networks.functional import FunctionalNetworks
from llmbrain.stats.nulls import circular_shift, phase_randomize, shifts_apart

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("correlation", "partial")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Connectivity:
    """What `connectivity` returns.

    Attributes
    ----------
    matrix : array ``(n_networks, n_networks)``
        Mean over runs, taken in Fisher z; the diagonal is 1.
    runs : array ``(n_runs, n_networks, n_networks)``
    p_fwe : array ``(n_networks, n_networks)``
        Two-sided, corrected over all pairs, against time courses that were shifted in a circle against each other; nan
        without draws and on the diagonal.
    kind : str
    names : list of str
    """

    matrix: Array
    runs: Array
    p_fwe: Array
    kind: str
    names: list[str]

    def to_frame(self) -> pd.DataFrame:
        """One row a pair: network_a, network_b, r, p_fwe; strongest first."""
        import pandas as pd

        a, b = np.triu_indices(len(self.matrix), 1)
        frame = pd.DataFrame(
            {
                "network_a": [self.names[i] for i in a],
                "network_b": [self.names[j] for j in b],
                "r": self.matrix[a, b],
                "p_fwe": self.p_fwe[a, b],
            }
        )
        return frame.sort_values("r", key=np.abs, ascending=False, kind="stable").reset_index(drop=True)


def connectivity(
    series: FunctionalNetworks | Sequence[ArrayLike],
    kind: str = "correlation",
    *,
    n_permutations: int = 0,
    min_shift: int = 10,
    random_state: int | None = 0,
) -> Connectivity:
    """Correlation or partial correlation of the networks' time courses.

    Parameters
    ----------
    series : FunctionalNetworks with time courses, or list of array ``(n_tokens, n_networks)``
    kind : {"correlation", "partial"}
        Partial correlation is from the Ledoit-Wolf covariance of z-scored series: shrunk, so few tokens will do.
    n_permutations : int
        Draws of the null, in which every network's time course is shifted by its own random amount in every run.
    min_shift : int
        Tokens that any two networks move against each other at least; less where there are so many networks that they
        do not fit into a run.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.

    Raises
    ------
    InputError
        If there are no time courses, one is constant (named), or a run is too short.
    """
    check_option("kind", kind, KINDS)
    check_count("n_permutations", n_permutations, 0)
    runs, names = _series(series)
    estimate = _correlation if kind == "correlation" else _partial
    observed = np.stack([estimate(run) for run in runs])
    matrix = _fisher_mean(observed)
    p = np.full(matrix.shape, np.nan)
    if n_permutations:
        rng = np.random.default_rng(random_state)
        upper = np.triu_indices(len(matrix), 1)
        maxima = np.empty(n_permutations)
        for i in range(n_permutations):
            drawn = np.stack(
                [estimate(circular_shift(run, shifts_apart(len(run), run.shape[1], min_shift, rng))) for run in runs]
            )
            maxima[i] = np.abs(_fisher_mean(drawn))[upper].max()
        reached = n_permutations - np.searchsorted(np.sort(maxima), np.abs(matrix) * (1 - 1e-12))
        p = (reached + 1) / (n_permutations + 1)
        np.fill_diagonal(p, np.nan)
    return Connectivity(matrix, observed, p, kind, names)


def dynamic_connectivity(
    series: FunctionalNetworks | Sequence[ArrayLike], window: int = 64, step: int = 16
) -> list[Array]:
    """Correlation in sliding windows; one array ``(n_windows, n_networks, n_networks)`` a run.

    Whether it really changes over time is what `dynamics_test` asks: windows of a stationary series differ too.

    Parameters
    ----------
    window, step : int
        Tokens. A run shorter than a window gives no matrix.
    """
    check_whole("window", window, 3)
    check_whole("step", step, 1)
    runs, _ = _series(series)
    return [_windows(run, window, step) for run in runs]


def dynamics_test(
    series: FunctionalNetworks | Sequence[ArrayLike],
    window: int = 64,
    step: int = 16,
    *,
    n_permutations: int = 200,
    random_state: int | None = 0,
) -> pd.DataFrame:
    """Does the connectivity of a pair vary over windows more than that of a stationary series with the same spectra?

    The null turns the phases of all networks of a run by the same random angles: spectra, cross-spectra and so the
    static connectivity stay, changes over time go (Hindriks et al. 2016, NeuroImage 127).

    Returns
    -------
    DataFrame
        One row a pair: network_a, network_b, sd (over windows of all runs, of Fisher z), null_sd (mean of the null), p,
        p_fwe (largest sd of all pairs), most variable first.
    """
    import pandas as pd

    check_count("n_permutations", n_permutations, 1)
    runs, names = _series(series)
    a, b = np.triu_indices(len(names), 1)

    def spread(some: Sequence[Array]) -> Array:
        windows = np.concatenate([_windows(run, window, step) for run in some])[:, a, b]
        if len(windows) < 2:
            raise InputError(f"window={window} leaves {len(windows)} windows: at least 2 are needed")
        return np.arctanh(np.clip(windows, -0.999999, 0.999999)).std(axis=0)

    rng = np.random.default_rng(random_state)
    observed = spread(runs)
    null = np.stack([spread([phase_randomize(run, rng) for run in runs]) for _ in range(n_permutations)])
    frame = pd.DataFrame(
        {
            "network_a": [names[i] for i in a],
            "network_b": [names[j] for j in b],
            "sd": observed,
            "null_sd": null.mean(axis=0),
            "p": ((null >= observed).sum(axis=0) + 1) / (n_permutations + 1),
            "p_fwe": ((null.max(axis=1)[:, None] >= observed).sum(axis=0) + 1) / (n_permutations + 1),
        }
    )
    return frame.sort_values("sd", ascending=False, kind="stable").reset_index(drop=True)


@dataclass(frozen=True)
class LayerFlow:
    """What `layer_flow` returns.

    Attributes
    ----------
    depth : DataFrame
        Of each network: center (mean layer of its neurons), spread (SD over layers), first, last.
    flow : DataFrame ``(n_layers, n_layers)``
        Coupling of layer (row) with layer (column): ``sum_ij |c_ij| share_i(row) share_j(column)`` over pairs i != j,
        with share_i the shares of network i's neurons over layers. Above the diagonal is what feeds forward.
    r : float
        Correlation over pairs between ``|c_ij|`` and the distance of their centres: negative if networks that work
        together lie in neighbouring layers.
    p : float
        Two-sided, against networks that change places (Mantel test).
    """

    depth: pd.DataFrame
    flow: pd.DataFrame
    r: float
    p: float


def layer_flow(
    networks: FunctionalNetworks, matrix: ArrayLike, *, n_permutations: int = 1000, random_state: int | None = 0
) -> LayerFlow:
    """How coupled networks are placed along the layers that a token passes.

    Parameters
    ----------
    networks : FunctionalNetworks with a space
    matrix : array ``(n_networks, n_networks)``
        Connectivity. Networks without neurons are left out.
    n_permutations : int
        Null draws.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.
    """
    import pandas as pd

    check_count("n_permutations", n_permutations, 1)
    coupling = np.abs(np.array(matrix, dtype=np.float64))
    if coupling.shape != (len(networks),) * 2:
        raise InputError(f"matrix of shape {coupling.shape} must be ({len(networks)}, {len(networks)})")
    np.fill_diagonal(coupling, 0)
    counts = networks.layer_profile()
    keep = counts.sum(axis=1).to_numpy() > 0
    if keep.sum() < 4:
        raise InputError(f"layer_flow needs at least 4 networks with neurons, there are {int(keep.sum())}")
    coupling = coupling[np.ix_(keep, keep)]
    layers = np.arange(counts.shape[1])
    share = counts.to_numpy()[keep] / counts.to_numpy()[keep].sum(axis=1, keepdims=True)
    center = share @ layers
    depth = pd.DataFrame(
        {
            "center": center,
            "spread": np.sqrt(np.maximum(share @ layers**2 - center**2, 0)),
            "first": (share > 0).argmax(axis=1),
            "last": len(layers) - 1 - (share > 0)[:, ::-1].argmax(axis=1),
        },
        index=counts.index[keep],
    )
    flow = pd.DataFrame(share.T @ coupling @ share, index=layers, columns=layers)
    upper = np.triu_indices(len(center), 1)
    distance = np.abs(center[:, None] - center)

    def mantel(order: NDArray[np.int64]) -> float:
        moved = distance[np.ix_(order, order)][upper]
        if moved.std() == 0 or coupling[upper].std() == 0:
            return 0.0
        return float(np.corrcoef(coupling[upper], moved)[0, 1])

    rng = np.random.default_rng(random_state)
    r = mantel(np.arange(len(center)))
    null = np.array([mantel(rng.permutation(len(center))) for _ in range(n_permutations)])
    p = ((np.abs(null) >= abs(r) * (1 - 1e-12)).sum() + 1) / (n_permutations + 1)
    return LayerFlow(depth, flow, r, float(p))


# -- time courses ------------------------------------------------------------------------------------------------------


def _series(series: FunctionalNetworks | Sequence[ArrayLike]) -> tuple[list[Array], list[str]]:
    names = series.names if isinstance(series, FunctionalNetworks) else None
    given: Any = series.time_courses if isinstance(series, FunctionalNetworks) else series
    given = [given] if getattr(given, "ndim", 0) == 2 else list(given)
    if not given:
        raise InputError("there are no time courses: fit the ICA on scans, or pass time_courses= to FunctionalNetworks")
    runs = [np.asarray(run, dtype=np.float64) for run in given]
    n = runs[0].shape[-1]
    names = names or [f"IC{k:02d}" for k in range(n)]
    for i, run in enumerate(runs):
        if run.ndim != 2 or run.shape[1] != n or n < 2:
            raise InputError(f"time course {i} of shape {run.shape} must be (n_tokens, {max(n, 2)})")
        if len(run) < 4 or not np.isfinite(run).all():
            raise InputError(f"time course {i} has {len(run)} tokens or holds nan: at least 4 finite ones are needed")
        flat = run.std(axis=0) <= 1e-12 * np.abs(run).max(axis=0)
        if flat.any():
            raise InputError(f"time courses of {[names[k] for k in np.flatnonzero(flat)]} are constant in run {i}")
    return [(run - run.mean(axis=0)) / run.std(axis=0) for run in runs], names


def _correlation(run: Array) -> Array:
    return run.T @ run / len(run)


def _partial(run: Array) -> Array:
    from sklearn.covariance import LedoitWolf

    precision = np.linalg.inv(LedoitWolf(assume_centered=True).fit(run).covariance_)
    scale = np.sqrt(np.diag(precision))
    partial = -precision / np.outer(scale, scale)
    np.fill_diagonal(partial, 1)
    return partial


def _fisher_mean(matrices: Array) -> Array:
    """Mean over the first axis in Fisher z; the diagonal is 1."""
    mean = np.tanh(np.arctanh(np.clip(matrices, -1 + 1e-12, 1 - 1e-12)).mean(axis=0))
    np.fill_diagonal(mean, 1)
    return mean


def _windows(run: Array, window: int, step: int) -> Array:
    starts = range(0, len(run) - window + 1, step)
    matrices = [_safe_correlation(run[s : s + window]) for s in starts]
    return np.stack(matrices) if matrices else np.empty((0, run.shape[1], run.shape[1]))


def _safe_correlation(part: Array) -> Array:
    centred = part - part.mean(axis=0)
    norm = np.sqrt((centred**2).sum(axis=0))
    norm[norm == 0] = np.inf  # a network that is silent in a window is correlated with nothing
    return (centred / norm).T @ (centred / norm)
