"""The same network found again: in another run, another half, another text, another model of one space."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_count, check_option, check_range
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.networks.functional import FunctionalNetworks
from llmbrain.stats import PUBLISHED_Z
from llmbrain.stats.matching import best_pairs, correlate_rows
from llmbrain.stats.nulls import SmoothMapsWarning
from llmbrain.stats.sparsity import overlap_matrix
from llmbrain.stats.tails import benjamini_hochberg

if TYPE_CHECKING:
    import pandas as pd

    from llmbrain.scanning.scans import Scan


SMOOTH = 0.25  # correlation of neighboring columns beyond which maps are those of a smooth image


def match_networks(
    a: FunctionalNetworks, b: FunctionalNetworks, *, n_permutations: int = 0, random_state: int | None = 0
) -> pd.DataFrame:
    """Pair networks one to one, so that the sum of ``|r|`` between their maps is largest (Hungarian method).

    Parameters
    ----------
    a, b : FunctionalNetworks
        Of one space: two halves, two texts, two seeds, or two models with the same widths (neurons are compared by
        position, so two models must share their weights' origin for this to mean anything).
    n_permutations : int
        Draws of the null: the neurons of `b` change places at random within their layer, the same way in all its maps.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.

    Returns
    -------
    DataFrame
        One row a pair, best first: network_a, network_b (rows), name_a, name_b, r (signed), dice, iou, and p:
        ``(n + 1)``-th part of draws whose largest ``|r|`` of all pairs reaches this one (family-wise error; nan for
        ``n_permutations=0``). Networks without partner are left out.
    """
    import pandas as pd

    _check_same(a, b)
    check_count("n_permutations", n_permutations, 0)
    r = correlate_rows(a.maps, b.maps)
    if n_permutations:
        check_neighbors(a, b)
    rows, columns = best_pairs(r)
    frame = pd.DataFrame(
        {
            "network_a": rows,
            "network_b": columns,
            "name_a": [a.names[i] for i in rows],
            "name_b": [b.names[j] for j in columns],
            "r": r[rows, columns],
            "dice": overlap_matrix(a.masks, b.masks)[rows, columns],
            "iou": overlap_matrix(a.masks, b.masks, "iou")[rows, columns],
        }
    )
    frame["p"] = np.nan
    if n_permutations:
        rng = np.random.default_rng(random_state)
        maxima = np.array(
            [
                np.abs(correlate_rows(a.maps, b.maps[:, shuffle_within_layers(b, rng)])).max()
                for _ in range(n_permutations)
            ]
        )
        reached = (maxima[:, None] >= np.abs(frame["r"].to_numpy())).sum(axis=0)
        frame["p"] = (reached + 1) / (n_permutations + 1)
    return frame.sort_values("r", key=np.abs, ascending=False, kind="stable").reset_index(drop=True)


def template_matches(
    templates: FunctionalNetworks, networks: FunctionalNetworks, *, kind: str = "iou", threshold: float = 0.2
) -> pd.DataFrame:
    """Best network for each template by overlap of their neurons, and whether it counts as the same network.

    arXiv 2502.20408 takes ``IoU > 0.2``. A network may serve several templates, as published.

    Returns
    -------
    DataFrame
        template, network (row of the best; -1 where nothing overlaps), overlap, found.
    """
    import pandas as pd

    check_option("kind", kind, ("dice", "iou"))
    check_range("threshold", threshold, 0, 1)
    _check_same(templates, networks)
    overlap = np.nan_to_num(overlap_matrix(templates.masks, networks.masks, kind))
    best = overlap.max(axis=1)
    return pd.DataFrame(
        {
            "template": np.arange(len(templates)),
            "network": np.where(best > 0, overlap.argmax(axis=1), -1),
            "overlap": best,
            "found": best > threshold,
        }
    )


def recurrence(
    templates: FunctionalNetworks,
    runs: Sequence[FunctionalNetworks],
    *,
    kind: str = "iou",
    threshold: float = 0.2,
    n_permutations: int = 200,
    random_state: int | None = 0,
) -> pd.DataFrame:
    """How often each template network comes back in single runs, against chance.

    Chance: the neurons of every run change places at random within their layer, all its networks alike, so that sizes,
    layers and mutual overlap stay.

    Parameters
    ----------
    templates : FunctionalNetworks
        Of the group.
    runs : list of FunctionalNetworks
        One a run; see `single_run_networks`. A run that the template was made from is no independent evidence.
    kind, threshold
        As in `template_matches`.
    n_permutations : int
        Null draws; 0 for none (p is nan then), as for networks of a brain.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.

    Returns
    -------
    DataFrame
        template, name, size, runs, found, rate, mean_overlap (of the best in each run), chance_rate (mean over draws),
        chance_overlap, p (of the rate) and p_overlap (of the mean overlap): ``(b + 1) / (n + 1)``; q: FDR of
        p_overlap over templates.
    """
    import pandas as pd

    check_count("n_permutations", n_permutations, 0)
    if not runs:
        raise InputError("runs is empty: pass the networks of at least one run")
    if n_permutations:
        check_neighbors(templates, *runs)
    tables = [template_matches(templates, run, kind=kind, threshold=threshold) for run in runs]
    overlap = np.array([t["overlap"] for t in tables])
    rng = np.random.default_rng(random_state)
    null = np.empty((n_permutations, *overlap.shape))
    for draw in null:
        for row, run in zip(draw, runs):
            moved = run.masks[:, shuffle_within_layers(run, rng)]
            row[:] = np.nan_to_num(overlap_matrix(templates.masks, moved, kind)).max(axis=1)
    rate, chance = (overlap > threshold).mean(axis=0), (null > threshold).mean(axis=1)
    mean, chance_mean = overlap.mean(axis=0), null.mean(axis=1)
    p_overlap = ((chance_mean >= mean).sum(axis=0) + 1) / (n_permutations + 1)
    p_rate = ((chance >= rate).sum(axis=0) + 1) / (n_permutations + 1)
    if not n_permutations:
        nothing = np.full((1, len(templates)), np.nan)
        chance, chance_mean, p_overlap, p_rate = nothing, nothing, nothing[0], nothing[0]
    return pd.DataFrame(
        {
            "template": np.arange(len(templates)),
            "name": templates.names,
            "size": templates.sizes,
            "runs": len(runs),
            "found": (overlap > threshold).sum(axis=0),
            "rate": rate,
            "mean_overlap": mean,
            "chance_rate": chance.mean(axis=0),
            "chance_overlap": chance_mean.mean(axis=0),
            "p": p_rate,
            "p_overlap": p_overlap,
            "q": benjamini_hochberg(p_overlap),
        }
    )


def single_run_networks(
    scans: Sequence[Scan | ArrayLike],
    n_components: int = 20,
    *,
    threshold: float = PUBLISHED_Z,
    random_state: int | None = 0,
    **options: Any,
) -> list[FunctionalNetworks]:
    """Networks of each run alone: one `GroupICA` a run.

    `options` go to `GroupICA`; ``axis="time"`` is the way of arXiv 2502.20408.
    """
    from llmbrain.decomposition import GroupICA

    return [
        FunctionalNetworks.from_ica(GroupICA(n_components, random_state=random_state, **options).fit([scan]), threshold)
        for scan in scans
    ]


def split_half(
    scans: Sequence[Scan | ArrayLike],
    n_components: int = 20,
    *,
    by: str = "runs",
    threshold: float = PUBLISHED_Z,
    n_permutations: int = 100,
    random_state: int | None = 0,
    **options: Any,
) -> pd.DataFrame:
    """Decompose two halves of the data by themselves and match their networks.

    Parameters
    ----------
    scans : list of Scan or arrays
    by : {"runs", "tokens"}
        Every second run, or the first against the second half of every run's tokens.
    n_permutations : int
        Null draws.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.

    Returns
    -------
    DataFrame
        As `match_networks` gives it.
    """
    from llmbrain.decomposition import GroupICA
    from llmbrain.scanning.inputs import Runs

    check_option("by", by, ("runs", "tokens"))
    runs = Runs(scans)
    if by == "runs":
        if len(runs) < 2:
            raise InputError("by='runs' needs two runs at least; by='tokens' halves each")
        halves = [list(scans)[::2], list(scans)[1::2]]
    else:
        data = list(runs)
        halves = [[d[: len(d) // 2] for d in data], [d[len(d) // 2 :] for d in data]]
    found = [
        FunctionalNetworks.from_ica(
            GroupICA(n_components, random_state=random_state, **options).fit(half), threshold, space=runs.space
        )
        for half in halves
    ]
    return match_networks(*found, n_permutations=n_permutations, random_state=random_state)


def check_neighbors(*groups: FunctionalNetworks) -> None:
    """Refuse a null of unrelated neurons for networks of a brain, and warn where neighbors resemble each other.

    Raises
    ------
    InputError
        For networks that lie in a brain: its voxels resemble their neighbors, and smooth maps match by chance more
        often than shuffled ones do.
    """
    for networks in groups:
        if networks.brain is not None:
            raise InputError(
                "n_permutations: a null that shuffles voxels is wrong for networks of a brain, whose neighbors "
                "resemble each other: smooth noise would pass for a match. Pass n_permutations=0 (no p)"
            )
        beside = smoothness(networks.maps)
        if beside > SMOOTH:
            warnings.warn(
                f"neighboring columns of the maps correlate by {beside:.2f}: these look like voxels of a smooth image. "
                "The null takes neighbors to be strangers, and smooth noise would pass for a match: do not trust this "
                "p",
                SmoothMapsWarning, stacklevel=3,
            )  # fmt: skip
            return


def smoothness(maps: NDArray[np.float32]) -> float:
    """Correlation of neighboring columns of z maps, median over maps, beyond that of distant ones."""
    n = maps.shape[1]
    if n < 50:
        return 0.0
    z = (maps - maps.mean(axis=1, keepdims=True)) / np.maximum(maps.std(axis=1, keepdims=True), 1e-12)
    beside, far = ((z[:, :-k] * z[:, k:]).mean(axis=1) for k in (1, n // 2))
    return float(np.median(beside - np.abs(far)))


def shuffle_within_layers(networks: FunctionalNetworks, rng: np.random.Generator) -> NDArray[np.int64]:
    """A random order of the neurons that leaves each in its layer (anywhere, without a space)."""
    space = networks.space if networks.space is not None else NeuronSpace([networks.n_neurons])
    parts = [space.layer_slice(layer) for layer in range(space.n_layers)]
    return np.concatenate([p.start + rng.permutation(p.stop - p.start) for p in parts])


def _check_same(a: FunctionalNetworks, b: FunctionalNetworks) -> None:
    if a.space is not None and b.space is not None and a.space != b.space:
        raise InputError(f"networks lie in {a.space} and {b.space}: only networks of one space can be matched")
    if a.n_neurons != b.n_neurons:
        raise InputError(f"networks cover {a.n_neurons} and {b.n_neurons} neurons: they must be the same neurons")
