"""Do components come back in other runs? Split halves, against a null of runs without networks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmbrain._validation import InputError, check_count, legacy_generator
from llmbrain.decomposition.group_ica import GroupICA
from llmbrain.decomposition.group_space import estimator, unmix_once
from llmbrain.decomposition.prepare.pca import project
from llmbrain.decomposition.prepare.reduce import default_run_components, group_subspace, reduced_run
from llmbrain.decomposition.prepare.source import Source
from llmbrain.decomposition.time_courses import standardize_maps
from llmbrain.decomposition.workers import workers
from llmbrain.scanning.inputs import Runs
from llmbrain.stats.matching import correlate_rows, match_maps
from llmbrain.stats.nulls import SmoothMapsWarning, phase_randomize

Array = NDArray[np.float64]
_SMOOTH = 0.1  # shared variance that neighbours have beyond others


@dataclass(frozen=True)
class SplitHalf:
    """What `split_half_reproducibility` returns.

    Attributes
    ----------
    maps : array ``(n_components, n_neurons)``
        From all runs; the components that `r` is about.
    r : array ``(n_splits, n_components)``
        ``|r|`` between the maps of the two halves that match each component.
    null : array ``(n_permutations, n_components)``
        The same for surrogates, mean over splits.
    p : array ``(n_components,)``
        ``(b + 1) / (n_permutations + 1)``, with b the number of surrogates whose **best** component is as reproducible.
    """

    maps: NDArray[Any]
    r: Array
    null: Array
    p: Array

    @property
    def reproducibility(self) -> Array:
        """Mean of `r` over splits; ``(n_components,)``."""
        return self.r.mean(axis=0)


def split_half_reproducibility(
    scans: Any,
    n_components: int = 20,
    *,
    n_splits: int = 5,
    n_permutations: int = 19,
    random_state: int | np.random.Generator | np.random.RandomState | None = 0,
    **options: Any,
) -> SplitHalf:
    """Decompose two halves of the runs and compare the maps.

    Parameters
    ----------
    scans : sequence of runs
        At least two; reduced once, and the reduced runs (1.5 `n_components` rows each) stay in memory.
    n_components : int
    n_splits : int
        Random halves.
    n_permutations : int
        Surrogates: every run with the phases of each neuron's time course drawn anew, so that spectra and variances are
        kept and networks are gone. Each costs as much as the analysis itself; 0 leaves the null out (p is then NaN).
        Must be 0 for images of a brain: see Notes.
    random_state : int, RandomState or None
    **options
        Further parameters of `GroupICA`.

    Returns
    -------
    SplitHalf

    Notes
    -----
    The question here is whether the *method* finds again what is in the runs, and would not in runs without networks.
    `llmbrain.networks.split_half` asks which *networks* of two halves overlap more than chance would have it.

    The null takes neighbours to be strangers, as neurons of a layer are. Voxels of a smooth image are not: maps of
    smooth noise are smooth, and match better than maps of surrogates whose voxels were randomized one by one. Such a p
    would be wrong, and is refused for images; for arrays whose columns resemble their neighbours there is a warning.

    Warns
    -----
    SmoothMapsWarning
    """
    check_count("n_splits", n_splits, 1)
    check_count("n_permutations", n_permutations, 0)
    ica = estimator(n_components, options)
    source = ica._source(scans, None)
    reader = source.runs
    if len(reader) < 2:
        raise InputError(f"split halves need at least 2 runs, got {len(reader)}")
    if n_permutations:
        check_neighbors(reader)
    generator = legacy_generator(random_state)
    orders = [generator.permutation(len(reader)) for _ in range(n_splits)]
    with workers(source.device):
        maps, r = _halves(ica, source, orders, generator)
        null = []
        for _ in range(n_permutations):
            surrogate = ica._source([PhaseRandomized(reader, i, generator) for i in range(len(reader))], None)
            null.append(_halves(ica, surrogate, orders, generator)[1].mean(axis=0))
    best = np.array([draw.max() for draw in null])
    p = np.full(n_components, np.nan)
    if n_permutations:
        p = ((best[:, None] >= r.mean(axis=0)).sum(axis=0) + 1) / (n_permutations + 1)
    return SplitHalf(maps, r, np.array(null).reshape(n_permutations, n_components), p)


def check_neighbors(runs: Runs) -> None:
    """Refuse a null of unrelated neurons for brain images, and warn where neighbouring columns resemble each other.

    Raises
    ------
    InputError
        For images that are read with a brain mask.
    """
    if runs.mask is not None or runs.surface is not None:
        raise InputError(
            "n_permutations: a null that randomizes every voxel by itself is wrong for images, whose neighbours "
            "resemble each other: smooth noise would pass for networks. Pass n_permutations=0 (no p), or a threshold "
            "that needs no null"
        )
    data = runs[0]
    if data.shape[1] < 50:
        return
    chosen = np.linspace(0, data.shape[1] - 2, min(data.shape[1] - 1, 2000)).astype(int)
    values = data[:, chosen].astype(np.float64)
    scores = [x / np.maximum(np.linalg.norm(x, axis=0), 1e-300) for x in (
        y - y.mean(axis=0) for y in (values, data[:, chosen + 1].astype(np.float64)))]  # fmt: skip
    beside = float(((scores[0] * scores[1]).sum(axis=0) ** 2).mean())
    far = float(((scores[0] * np.roll(scores[1], len(chosen) // 2, axis=1)).sum(axis=0) ** 2).mean())
    if beside - far > _SMOOTH:
        warnings.warn(
            f"neighbouring columns share {100 * beside:.0f}% of their variance, distant ones {100 * far:.0f}%: these "
            "look like voxels of a smooth image. The null takes neighbours to be strangers, and smooth noise would "
            "pass for networks: do not trust this p",
            SmoothMapsWarning,
            stacklevel=3,
        )


class PhaseRandomized:
    """A run whose neurons keep their spectra and lose what they have in common; made when read."""

    def __init__(self, reader: Runs, index: int, random_state: np.random.RandomState) -> None:
        self.reader, self.index = reader, index
        self.name = f"phase-randomized {reader.name(index)}"
        self.seed = random_state.randint(2**31 - 1)  # the same surrogate at every reading
        positions = reader.positions(index)
        if positions is not None:
            self.positions = positions

    def data(self) -> NDArray[Any]:
        """The surrogate, ``(n_tokens, n_neurons)``."""
        return phase_randomize(self.reader[self.index], np.random.default_rng(self.seed), shared=False)


def _halves(
    ica: GroupICA, source: Source, orders: list[NDArray[np.int64]], random_state: np.random.RandomState
) -> tuple[NDArray[Any], Array]:
    """Maps of all runs, and ``|r|`` between the halves of each split, per component."""
    k = int(ica.n_components)
    rows, live = [], None
    size = ica.run_components or default_run_components(k, ica.cca)
    for run in source.prepared("reduce"):
        rows.append(reduced_run(run, slice(0, run.n_neurons), size, ica.cca, ica.center_tokens)[0])
        live = run.live if live is None else live | run.live
    assert live is not None  # a reader is never empty

    def maps_of(runs: Any) -> NDArray[Any]:
        n_live = int(live.sum())
        white = group_subspace(torch.cat([rows[i] for i in runs]), k, live, center=ica.center_tokens).data
        unmixing, _, _ = unmix_once(ica, white, n_live, random_state)
        return standardize_maps(project(torch.from_numpy(unmixing).to(white.device), white), live).cpu().numpy()

    reference = maps_of(range(len(rows)))
    r = np.empty((len(orders), k))
    for i, order in enumerate(orders):
        halves = [maps_of(half) for half in np.array_split(order, 2)]
        first, second = (half[match_maps(half, reference)[0]] for half in halves)
        r[i] = np.abs(np.diag(correlate_rows(first, second)))
    return reference, r
