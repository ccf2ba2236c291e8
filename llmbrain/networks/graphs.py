"""Graph measures of a connectivity matrix, beside random graphs of the same degrees, and its hubs.

Raw values depend on the number of nodes and edges more than on anything else: only the normalized ones compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.csgraph import shortest_path

from llmbrain._validation import InputError, check_count, check_range, seed_of

if TYPE_CHECKING:
    import pandas as pd

    from llmbrain.networks.connectivity import Connectivity

Array = NDArray[np.float64]
SWAPS_PER_EDGE = 10


def to_graph(matrix: ArrayLike, density: float = 0.1) -> Array:
    """Adjacency (0 and 1) of the strongest positive links, a share `density` of all pairs.

    Raises
    ------
    InputError
        If the matrix is not square and symmetric, or has fewer positive links than asked for.
    """
    check_range("density", density, 0, 1, open_low=True)
    weights = np.array(matrix, dtype=np.float64)
    n = len(weights)
    if weights.shape != (n, n) or n < 3 or not np.allclose(weights, weights.T, equal_nan=True):
        raise InputError(f"matrix of shape {weights.shape} must be square and symmetric, at least 3 x 3")
    rows, columns = np.triu_indices(n, 1)
    values = weights[rows, columns]
    count = max(1, round(density * len(values)))
    order = np.argsort(-np.nan_to_num(values), kind="stable")[:count]
    if not (values[order] > 0).all():
        positive = float((values > 0).mean())
        raise InputError(f"density={density} asks for more links than are positive (a share of {positive:.3f})")
    adjacency = np.zeros((n, n))
    adjacency[rows[order], columns[order]] = adjacency[columns[order], rows[order]] = 1
    return adjacency


def clustering(adjacency: Array) -> float:
    """Mean over nodes of the share of a node's neighbours that are neighbours (0 for fewer than two)."""
    degree = adjacency.sum(axis=0)
    triangles = np.einsum("ij,jk,ki->i", adjacency, adjacency, adjacency, optimize=True)
    possible = degree * (degree - 1)
    return float(np.divide(triangles, possible, out=np.zeros(len(degree)), where=possible > 0).mean())


def path_length(adjacency: Array) -> float:
    """Mean number of steps between two nodes; nan where some can not be reached."""
    steps = shortest_path(adjacency, unweighted=True)[np.triu_indices(len(adjacency), 1)]
    return float(steps.mean()) if np.isfinite(steps).all() else np.nan


def global_efficiency(adjacency: Array) -> float:
    """Mean of 1 / steps between two nodes (0 where unreachable): defined for graphs in pieces too."""
    steps = shortest_path(adjacency, unweighted=True)[np.triu_indices(len(adjacency), 1)]
    return float((1 / steps).mean())


def modules(adjacency: Array, *, n_seeds: int = 100, random_state: int | None = 0) -> tuple[NDArray[np.int64], float]:
    """Best of `n_seeds` Louvain partitions: module of each node (largest first), and its modularity Q."""
    import networkx as nx

    check_count("n_seeds", n_seeds, 1)
    random_state = seed_of(random_state)
    graph = nx.from_numpy_array(adjacency)
    if not graph.number_of_edges():
        return np.arange(len(adjacency)), 0.0
    best: tuple[float, Any] = (-np.inf, None)
    for seed in range(n_seeds):
        partition = nx.community.louvain_communities(graph, weight=None, seed=random_state + seed)
        q = float(nx.community.modularity(graph, partition, weight=None))
        if q > best[0] + 1e-12:
            best = (q, partition)
    label = np.empty(len(adjacency), dtype=np.int64)
    for i, members in enumerate(sorted(best[1], key=lambda m: (-len(m), min(m)))):
        label[list(members)] = i
    return label, best[0]


def participation(adjacency: Array, module: NDArray[np.int64]) -> Array:
    """Participation coefficient: 0 if all links of a node are in one module (Guimerà and Amaral 2005); nan for none."""
    links = np.stack([adjacency[:, module == m].sum(axis=1) for m in np.unique(module)], axis=1)
    degree = links.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return 1 - ((links / degree) ** 2).sum(axis=1)


def within_module_z(adjacency: Array, module: NDArray[np.int64]) -> Array:
    """z of a node's links into its own module, over the nodes of the module; 0 where they all have as many."""
    inside = np.array([adjacency[i, module == module[i]].sum() for i in range(len(module))])
    z = np.zeros(len(module))
    for m in np.unique(module):
        own = module == m
        if inside[own].std() > 0:
            z[own] = (inside[own] - inside[own].mean()) / inside[own].std()
    return z


def rewire(adjacency: Array, rng: np.random.Generator, swaps_per_edge: int = SWAPS_PER_EDGE) -> Array:
    """A random graph with the same degrees: pairs of edges exchange ends (Maslov and Sneppen 2002).

    ``swaps_per_edge * n_edges`` exchanges are tried; one that would make a loop or a double edge is left out.
    """
    linked = adjacency.astype(bool)
    edges = np.argwhere(np.triu(linked, 1))
    if len(edges) < 2:
        return adjacency.copy()
    tries = swaps_per_edge * len(edges)
    picks = rng.integers(len(edges), size=(tries, 2))
    flips = rng.random(tries) < 0.5
    for (i, j), flip in zip(picks.tolist(), flips.tolist()):
        a, b = edges[i]
        c, d = edges[j] if not flip else edges[j][::-1]
        if len({a, b, c, d}) < 4 or linked[a, d] or linked[c, b]:
            continue
        linked[a, b] = linked[b, a] = linked[c, d] = linked[d, c] = False
        linked[a, d] = linked[d, a] = linked[c, b] = linked[b, c] = True
        edges[i], edges[j] = (a, d), (c, b)
    return linked.astype(np.float64)


def graph_measures(
    matrix: Connectivity | ArrayLike,
    densities: Sequence[float] = (0.05, 0.1, 0.15, 0.2),
    *,
    n_permutations: int = 100,
    n_seeds: int = 20,
    random_state: int | None = 0,
) -> pd.DataFrame:
    """Measures of the graph of strongest positive links, and of rewired graphs of the same degrees.

    Parameters
    ----------
    matrix : Connectivity, or array ``(n_networks, n_networks)``
    densities : sequence of float
        Shares of all pairs that become links; report the sweep, not one choice.
    n_permutations : int
        Rewired graphs, 10 tried exchanges an edge each.
    n_seeds : int
        Louvain starts for the modularity of the graph, and a fifth of them (at least one) for each rewired one.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.

    Returns
    -------
    DataFrame
        One row a density and measure (clustering, path_length, global_efficiency, modularity, participation, sigma):
        value, null_mean, null_sd, normalized = value / null_mean, z, p (two-sided, ``(b + 1) / (n + 1)``). sigma is
        ``(C / C_null) / (L / L_null)``, with no null of its own. Path length is nan where the graph is in pieces.
    """
    import pandas as pd

    check_count("n_permutations", n_permutations, 2)
    random_state = seed_of(random_state)
    links: Any = getattr(matrix, "matrix", matrix)
    rows = []
    for density in densities:
        adjacency = to_graph(links, density)
        rng = np.random.default_rng(random_state)
        value = _measures(adjacency, n_seeds, random_state)
        few = max(1, n_seeds // 5)
        null = [_measures(rewire(adjacency, rng), few, random_state + i) for i in range(n_permutations)]
        means = {}
        for name, own in value.items():
            draws = np.array([measures[name] for measures in null])
            draws = draws[np.isfinite(draws)]
            mean, sd = (draws.mean(), draws.std(ddof=1)) if len(draws) > 1 else (np.nan, np.nan)
            means[name] = mean
            above, below = (draws >= own - 1e-12).sum(), (draws <= own + 1e-12).sum()
            p = min(1.0, 2 * (min(above, below) + 1) / (len(draws) + 1)) if np.isfinite(own) and len(draws) else np.nan
            rows.append(
                {
                    "density": density, "measure": name, "value": own, "null_mean": mean, "null_sd": sd,
                    "normalized": own / mean if mean else np.nan,
                    "z": (own - mean) / sd if sd > 0 else np.nan, "p": p,
                }
            )  # fmt: skip
        c, length = means["clustering"], means["path_length"]
        sigma = (value["clustering"] / c) / (value["path_length"] / length) if c > 0 else np.nan
        rows.append({"density": density, "measure": "sigma", "value": sigma})
    return pd.DataFrame(rows)


def hubs(
    matrix: ArrayLike,
    density: float = 0.1,
    *,
    names: Sequence[str] | None = None,
    n_seeds: int = 100,
    random_state: int | None = 0,
) -> pd.DataFrame:
    """Role of each network in the graph.

    Returns
    -------
    DataFrame
        Indexed by network: module, degree, strength (sum of positive connectivity of its links), participation,
        within_module_z, role: "connector hub" or "provincial hub" for ``within_module_z > 1`` with participation above
        or up to 0.3, "connector" for participation above 0.62, else "peripheral" ("isolated" without links). The cuts
        follow Guimerà and Amaral 2005, with the hub cut lowered from 2.5 to 1, for graphs of tens of nodes.
    """
    import pandas as pd

    weights = np.array(matrix, dtype=np.float64)
    adjacency = to_graph(weights, density)
    module, _ = modules(adjacency, n_seeds=n_seeds, random_state=random_state)
    degree = adjacency.sum(axis=0)
    spread, z = participation(adjacency, module), within_module_z(adjacency, module)
    role = np.where(spread > 0.62, "connector", "peripheral")
    role = np.where(z > 1, np.where(spread > 0.3, "connector hub", "provincial hub"), role)
    role = np.where(degree == 0, "isolated", role)
    labels = [f"IC{k:02d}" for k in range(len(weights))] if names is None else list(names)
    frame = pd.DataFrame(
        {
            "module": module,
            "degree": degree.astype(int),
            "strength": (adjacency * weights).sum(axis=0),
            "participation": spread,
            "within_module_z": z,
            "role": role,
        },
        index=pd.Index(labels, name="network"),
    )
    return frame


def _measures(adjacency: Array, n_seeds: int, random_state: int) -> dict[str, float]:
    module, q = modules(adjacency, n_seeds=n_seeds, random_state=random_state)
    spread = participation(adjacency, module)
    return {
        "clustering": clustering(adjacency),
        "path_length": path_length(adjacency),
        "global_efficiency": global_efficiency(adjacency),
        "modularity": q,
        "participation": float(np.nanmean(spread)) if np.isfinite(spread).any() else np.nan,
    }
