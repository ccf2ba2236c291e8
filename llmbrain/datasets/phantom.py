"""The phantom: scans whose networks are known, for testing methods rather than models.

A run is ``time courses (n_tokens, n_sources) @ run maps (n_sources, n_neurons) + noise``. Everything that makes real
groups hard is a parameter: noise, few tokens, overlapping maps, networks that move or vanish between runs, slow time
courses, massive activations, dead neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.signal import lfilter
from scipy.stats import rankdata

from llmbrain._validation import InputError, check_option, check_range, check_whole
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.scanning import Scan
from llmbrain.stats.matching import correlate_rows, match_maps

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PhantomCell:
    """One cell of the test grid: `settings` for `make_phantom`, and the `marks` a method must reach (may be none)."""

    settings: Mapping[str, Any]
    marks: Mapping[str, float] = field(default_factory=dict)


_MIDDLE = {"overlap": 0.2, "cnr": 1.0, "relocation": 0.05}
_HARD = {"overlap": 0.4, "relocation": 0.10}
_SMALL = {"n_runs": 6, "n_tokens": 150}
_MIDDLE_MARKS = {"map_r_median": 0.8, "time_course_r_median": 0.8, "map_r_min": 0.7}

PHANTOM_CELLS: dict[str, PhantomCell] = {
    "easy": PhantomCell(
        {"overlap": 0.0, "cnr": 2.0, "relocation": 0.0},
        {"map_r_min": 0.95, "time_course_r_median": 0.9, "iq_min": 0.9},
    ),
    "middle": PhantomCell(_MIDDLE, _MIDDLE_MARKS),
    "middle, few tokens": PhantomCell({**_MIDDLE, **_SMALL}, _MIDDLE_MARKS),
    "hard": PhantomCell({**_HARD, "cnr": 0.5}),
    "hardest": PhantomCell({**_HARD, "cnr": 0.25, **_SMALL}),
}
"""Named cells of the grid; `marks` are lower bounds on what `Phantom.score` returns (`iq_min` on ICASSO's Iq)."""


@dataclass(frozen=True)
class Phantom:
    """Scans with their truth.

    Attributes
    ----------
    scans : list of Scan
        One a run, ``(n_tokens, n_neurons)`` float32; pass them to anything that takes scans.
    space : NeuronSpace
    maps : array ``(n_sources, n_neurons)``
        Group truth, in units of the noise SD.
    run_maps : array ``(n_runs, n_sources, n_neurons)``
        Truth of each run: jittered, moved and scaled; zero for a source that the run does not have.
    time_courses : list of array ``(n_tokens, n_sources)``
        Zero mean and unit SD, so that ``scan = time_courses @ run_maps + noise``.
    amplitudes : array ``(n_runs, n_sources)``
        Strength of each source in each run, 0 where absent.
    noise_sd : array ``(n_neurons,)``
    missing : bool array ``(n_runs, n_neurons)``
        Neurons that are silent (constantly zero) in a run.
    nuisance_map, nuisance_time_course : array or None
        The position source, if one was asked for.
    source_correlation : array ``(n_sources, n_sources)``
        Expected correlation of the time courses.
    """

    scans: list[Scan]
    space: NeuronSpace
    maps: Array
    run_maps: Array
    time_courses: list[Array]
    amplitudes: Array
    noise_sd: Array
    missing: NDArray[np.bool_]
    source_correlation: Array
    nuisance_map: Array | None = None
    nuisance_time_course: Array | None = None

    @property
    def present(self) -> NDArray[np.bool_]:
        """Which run has which source; bool ``(n_runs, n_sources)``."""
        return self.amplitudes > 0

    def standardized(self, maps: ArrayLike | None = None) -> Array:
        """Maps (default: the group truth) divided by the expected SD of each neuron.

        An ICA of z-scored neurons estimates this, not the raw weights: |r| with the raw weights is lower for a perfect
        estimate, because strong neurons are scaled down.
        """
        maps = np.asarray(self.maps if maps is None else maps, dtype=np.float64)
        variance = np.einsum("kv,kj,jv->v", maps, self.source_correlation, maps) + self.noise_sd**2
        if self.nuisance_map is not None:
            variance += self.nuisance_map**2
        return maps / np.sqrt(variance)

    def score(
        self,
        maps: ArrayLike,
        time_courses: Sequence[ArrayLike] | None = None,
        run_maps: ArrayLike | None = None,
        *,
        standardized: bool = True,
    ) -> dict[str, Any]:
        """Compare estimated maps with the truth, matched one to one by |r|.

        Parameters
        ----------
        maps : array ``(n_components, n_neurons)``
        time_courses : list of array ``(n_tokens, n_components)``, optional
        run_maps : array ``(n_runs, n_components, n_neurons)``, optional
            In the units of the data, as stage 2 of dual regression gives them.
        standardized : bool
            Whether `maps` come from z-scored neurons (see `standardized`); run maps are always held against raw truth.

        Returns
        -------
        dict
            ``map_r`` (per source, |r|) with ``_min``, ``_median``, ``_mean`` and ``map_share_above_0.9``; ``auc`` and
            ``dice`` of the thresholded map (as many neurons as the truth), medians; ``match`` (component of each
            source). With time courses: ``time_course_r`` (median over runs that have the source), ``_min``,
            ``_median``, and ``netmat_r`` (correlation of estimated with true network matrices over all pairs). With run
            maps: ``run_map_r_own`` and ``run_map_r_group`` (medians: against the run's own truth, and against the
            group truth), and ``amplitude_slope`` (estimated on true strength along the group map; 1 is right).
        """
        maps = np.asarray(maps, dtype=np.float64)
        truth = self.standardized() if standardized else self.maps
        match, signed = match_maps(maps, truth)
        if (match < 0).any():
            raise InputError(f"maps has {len(maps)} components, fewer than the {len(truth)} sources of the phantom")
        r = np.abs(signed)
        picked = np.abs(maps[match])
        active = self.maps != 0
        out: dict[str, Any] = {
            "match": match,
            "map_r": r,
            "map_r_min": float(r.min()),
            "map_r_median": float(np.median(r)),
            "map_r_mean": float(r.mean()),
            "map_share_above_0.9": float((r > 0.9).mean()),
            "auc": float(np.median([_auc(p, a) for p, a in zip(picked, active)])),
            "dice": float(np.median([_dice_of_top(p, a) for p, a in zip(picked, active)])),
        }
        if time_courses is not None:
            out.update(self._score_time_courses([np.asarray(t)[:, match] for t in time_courses], np.sign(signed)))
        if run_maps is not None:
            out.update(self._score_run_maps(np.asarray(run_maps)[:, match] * np.sign(signed)[:, None]))
        return out

    def _score_time_courses(self, estimate: list[NDArray[Any]], sign: Array) -> dict[str, Any]:
        r = np.array([np.abs(np.diag(correlate_rows(e.T, t.T))) for e, t in zip(estimate, self.time_courses)])
        r = np.where(self.present, r, np.nan)
        per_source = np.nanmedian(r, axis=0)
        upper = np.triu_indices(len(self.maps), 1)
        found, true = [], []
        for e, t, present in zip(estimate, self.time_courses, self.present):
            both = (present[:, None] & present)[upper]
            found.append(correlate_rows((e * sign).T, (e * sign).T)[upper][both])
            true.append(correlate_rows(t.T, t.T)[upper][both])
        return {
            "time_course_r": per_source,
            "time_course_r_min": float(per_source.min()),
            "time_course_r_median": float(np.median(per_source)),
            "netmat_r": float(np.corrcoef(np.concatenate(found), np.concatenate(true))[0, 1]),
        }

    def _score_run_maps(self, estimate: NDArray[Any]) -> dict[str, Any]:
        own, group, found, true = [], [], [], []
        for run, source in zip(*np.nonzero(self.present)):
            x, reference = estimate[run, source], self.maps[source]
            own.append(correlate_rows(x, self.run_maps[run, source])[0, 0])
            group.append(correlate_rows(x, reference)[0, 0])
            found.append(x @ reference / (reference @ reference))
            true.append(self.run_maps[run, source] @ reference / (reference @ reference))
        return {
            "run_map_r_own": float(np.median(own)),
            "run_map_r_group": float(np.median(group)),
            "amplitude_slope": float(np.polyfit(true, found, 1)[0]),
        }


def _auc(score: Array, positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve, from ranks (Mann-Whitney)."""
    n = positive.sum()
    return float((rankdata(score)[positive].sum() - n * (n + 1) / 2) / (n * (~positive).sum()))


def _dice_of_top(score: Array, positive: NDArray[np.bool_]) -> float:
    n = int(positive.sum())
    return float(positive[np.argsort(-score, kind="stable")[:n]].mean())


def make_phantom(
    n_sources: int = 8,
    *,
    n_neurons: int = 2000,
    n_layers: int = 8,
    widths: Sequence[int] | None = None,
    n_runs: int = 12,
    n_tokens: int = 400,
    active: float = 0.03,
    overlap: float = 0.0,
    cnr: float = 2.0,
    ar: float = 0.5,
    noise_ar: float = 0.0,
    noise: str = "gaussian",
    shared_variance: float = 0.3,
    presence: float = 0.9,
    jitter: float = 0.3,
    relocation: float = 0.0,
    amplitude_sd: float = 0.25,
    source_correlation: ArrayLike | None = None,
    outliers: float = 0.0,
    position_gain: float = 0.0,
    missing: float = 0.0,
    conditions: Sequence[str] = (),
    block: int = 20,
    condition_effect: float = 1.0,
    random_state: int | np.random.Generator | None = 0,
) -> Phantom:
    """Make scans with known sources.

    Parameters
    ----------
    n_sources : int
        Number of networks.
    n_neurons, n_layers : int
        Size; layers are as equal as possible. `widths` (neurons per layer) overrides both.
    n_runs, n_tokens : int
        Number of runs, and tokens in each.
    active : float
        Share of all neurons that belongs to a source, over several layers; weights are Laplace distributed.
    overlap : float
        Share of a source's neurons that also belong to the source before it, 0 to 0.5.
    cnr : float
        Contrast to noise: median SD of the signal over **active** neurons, divided by the noise SD (which is 1).
    ar, noise_ar : float
        Lag-one autocorrelation of the time courses, and of the noise.
    noise : {"gaussian", "t3"}
        Distribution of the noise, unit variance; ``"t3"`` is Student's t with 3 degrees of freedom.
    shared_variance : float
        Share of a time course's variance that all runs have in common.
    presence : float
        Probability that a run has a source; every source is in at least one run.
    jitter : float
        SD of the factor on each neuron's weight, per run.
    relocation : float
        Share of a source's neurons that lie elsewhere in the same layer, per run: the analogue of anatomy that moves.
    amplitude_sd : float
        SD of a source's strength over runs (mean 1; at least 0.1).
    source_correlation : array ``(n_sources, n_sources)``, optional
        Correlation of the sources' time courses; default: none.
    outliers : float
        Share of neurons with 100 times the noise variance, as massive activations have.
    position_gain : float
        Above 0, add one source that answers to position alone (strongest at the first token, decaying over 5 tokens),
        with weights this many times those of the others: the begin-of-sequence artefact. 10 is typical.
    missing : float
        Share of neurons that are constantly zero, drawn for each run.
    conditions : sequence of str
        Names of conditions, in blocks of `block` tokens in turn. Source k answers to condition k by `condition_effect`
        SD; sources beyond the number of conditions answer to none (they are the control). Scans carry the events.
    random_state : int, Generator or None

    Returns
    -------
    Phantom

    Raises
    ------
    InputError
        If a parameter is out of range, or the sources do not fit into the neurons.

    Notes
    -----
    In the manner of SimTB (Erhardt et al. 2012, NeuroImage 59:4160), with units instead of blobs and relocation instead
    of translation.
    """
    check_whole("n_sources", n_sources, 1)
    check_whole("n_runs", n_runs, 1)
    check_whole("n_tokens", n_tokens, 2)
    shares = {"shared_variance": shared_variance, "presence": presence, "relocation": relocation, "outliers": outliers}
    for name, share in shares.items():
        check_range(name, share, 0, 1)
    for name, share in {"ar": ar, "noise_ar": noise_ar, "missing": missing}.items():
        check_range(name, share, 0, 1, open_high=True)
    check_range("overlap", overlap, 0, 0.5)
    check_range("active", active, 0, 1, open_low=True)
    check_range("cnr", cnr, 0, open_low=True)
    for name, factor in {"jitter": jitter, "amplitude_sd": amplitude_sd, "position_gain": position_gain}.items():
        check_range(name, factor, 0)
    check_option("noise", noise, ("gaussian", "t3"))
    if len(conditions) > n_sources:
        raise InputError(f"conditions={list(conditions)!r}: at most one per source, and n_sources={n_sources}")

    space = NeuronSpace(widths if widths is not None else _equal_widths(n_neurons, n_layers))
    correlation = _checked_correlation(source_correlation, n_sources)
    seeds = _generators(random_state, n_runs + 1)
    rng = seeds[0]

    maps = _group_maps(n_sources, space, active, overlap, rng)
    signal_sd = np.sqrt(np.einsum("kv,kj,jv->v", maps, correlation, maps))
    maps *= cnr / np.median(signal_sd[signal_sd > 0])
    noise_sd = np.where(_pick(space.n_neurons, outliers, rng), 10.0, 1.0)
    shared = _sources(n_tokens, correlation, ar, rng)
    amplitudes = _amplitudes(n_runs, n_sources, presence, amplitude_sd, rng)
    nuisance_map = nuisance_time_course = None
    if position_gain > 0:
        nuisance_map = position_gain * np.median(np.abs(maps[maps != 0])) * _group_maps(1, space, active, 0.0, rng)[0]
        nuisance_time_course = _standardize(np.exp(-np.arange(n_tokens) / 5.0))
    events, task = _block_design(conditions, block, n_tokens, n_sources)

    scans, run_maps, time_courses, silent = [], [], [], []
    for run, own in enumerate(seeds[1:]):
        course = np.sqrt(shared_variance) * shared
        course = course + np.sqrt(1 - shared_variance) * _sources(n_tokens, correlation, ar, own)
        course = _standardize(course + condition_effect * task)
        run_map = _run_map(maps, jitter, relocation, space, own) * amplitudes[run][:, None]
        gone = _pick(space.n_neurons, missing, own)
        run_map[:, gone] = 0
        data = course @ run_map + noise_sd * _noise((n_tokens, space.n_neurons), noise, noise_ar, own)
        if nuisance_map is not None and nuisance_time_course is not None:
            data += np.outer(nuisance_time_course, nuisance_map)
        data[:, gone] = 0
        scans.append(Scan.from_array(data.astype(np.float32), space, events=events, name=f"phantom-{run + 1:04d}"))
        run_maps.append(run_map)
        time_courses.append(course)
        silent.append(gone)
    return Phantom(
        scans=scans,
        space=space,
        maps=maps,
        run_maps=np.array(run_maps),
        time_courses=time_courses,
        amplitudes=amplitudes,
        noise_sd=noise_sd,
        missing=np.array(silent),
        source_correlation=correlation,
        nuisance_map=nuisance_map,
        nuisance_time_course=nuisance_time_course,
    )


# -- parts of the generator --------------------------------------------------------------------------------------------


def _equal_widths(n_neurons: int, n_layers: int) -> list[int]:
    check_whole("n_layers", n_layers, 1)
    check_whole("n_neurons", n_neurons, n_layers)
    return [n_neurons // n_layers + (layer < n_neurons % n_layers) for layer in range(n_layers)]


def _generators(random_state: int | np.random.Generator | None, n: int) -> list[np.random.Generator]:
    """One stream for the group and one per run, so that run 3 is the same whether there are 4 runs or 40."""
    return np.random.default_rng(random_state).spawn(n)


def _checked_correlation(correlation: ArrayLike | None, n_sources: int) -> Array:
    if correlation is None:
        return np.eye(n_sources)
    matrix = np.asarray(correlation, dtype=np.float64)
    if matrix.shape != (n_sources, n_sources):
        raise InputError(f"source_correlation has shape {matrix.shape}, expected {(n_sources, n_sources)}")
    if not np.allclose(matrix, matrix.T) or not np.allclose(np.diag(matrix), 1):
        raise InputError("source_correlation must be symmetric with ones on the diagonal")
    smallest = float(np.linalg.eigvalsh(matrix)[0])
    if smallest <= 0:
        raise InputError(f"source_correlation must be positive definite; its smallest eigenvalue is {smallest:.3g}")
    return matrix


def _pick(n: int, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    chosen = np.zeros(n, dtype=bool)
    chosen[rng.choice(n, round(share * n), replace=False)] = True
    return chosen


def _group_maps(n_sources: int, space: NeuronSpace, active: float, overlap: float, rng: np.random.Generator) -> Array:
    """Laplace weights on disjoint neurons, except for the share that a source borrows from the one before it.

    Each source has its own profile over layers, so that networks lie in several layers but not evenly.
    """
    size = round(active * space.n_neurons)
    borrowed = round(overlap * size)
    needed = size * n_sources - borrowed * (n_sources - 1)
    if size < 1 or needed > space.n_neurons:
        raise InputError(
            f"active={active} of {space.n_neurons} neurons for n_sources={n_sources} needs {needed} neurons "
            f"({size} each): between 1 each and {space.n_neurons} in all are possible"
        )
    maps = np.zeros((n_sources, space.n_neurons))
    free = np.ones(space.n_neurons, dtype=bool)
    own = np.empty(0, dtype=np.int64)
    for k, weights in enumerate(maps):
        profile = rng.dirichlet(np.ones(space.n_layers)) + 0.1 / space.n_layers
        candidates = np.flatnonzero(free)
        p = profile[space.layer_of[candidates]]
        lent = rng.choice(own, borrowed, replace=False) if k else own
        own = rng.choice(candidates, size - len(lent), replace=False, p=p / p.sum())
        free[own] = False
        units = np.concatenate([lent, own])
        weights[units] = rng.laplace(size=size)
    return maps


def _sources(n_tokens: int, correlation: Array, ar: float, rng: np.random.Generator) -> Array:
    """Stationary AR(1) series with unit variance and the given correlation; ``(n_tokens, n_sources)``."""
    return _autoregressive(rng.standard_normal((n_tokens, len(correlation))), ar) @ np.linalg.cholesky(correlation).T


def _autoregressive(innovations: Array, ar: float) -> Array:
    if ar == 0:
        return innovations
    scaled = innovations * np.sqrt(1 - ar**2)
    scaled[0] = innovations[0]  # start in the stationary distribution
    return lfilter([1.0], [1.0, -ar], scaled, axis=0)


def _standardize(series: Array) -> Array:
    centred = series - series.mean(axis=0)
    return centred / centred.std(axis=0)


def _amplitudes(n_runs: int, n_sources: int, presence: float, sd: float, rng: np.random.Generator) -> Array:
    amplitudes = np.maximum(1 + sd * rng.standard_normal((n_runs, n_sources)), 0.1)
    present = rng.random((n_runs, n_sources)) < presence
    present[rng.integers(n_runs, size=n_sources), np.arange(n_sources)] |= ~present.any(axis=0)
    return amplitudes * present


def _run_map(maps: Array, jitter: float, relocation: float, space: NeuronSpace, rng: np.random.Generator) -> Array:
    run_map = maps * (1 + jitter * rng.standard_normal(maps.shape))
    for weights in run_map:
        units = np.flatnonzero(weights)
        for unit in rng.choice(units, round(relocation * len(units)), replace=False):
            layer = space.layer_slice(space.layer_of[unit])
            empty = layer.start + np.flatnonzero(weights[layer] == 0)
            if len(empty):
                weights[rng.choice(empty)], weights[unit] = weights[unit], 0.0
    return run_map


def _noise(shape: tuple[int, int], kind: str, ar: float, rng: np.random.Generator) -> Array:
    white = rng.standard_normal(shape) if kind == "gaussian" else rng.standard_t(3, shape) / np.sqrt(3)
    return _autoregressive(white, ar)


def _block_design(
    conditions: Sequence[str], block: int, n_tokens: int, n_sources: int
) -> tuple[pd.DataFrame | None, Array]:
    """Events, and each source's own condition as a zero-one series ``(n_tokens, n_sources)``."""
    task = np.zeros((n_tokens, n_sources))
    if not conditions:
        return None, task
    check_whole("block", block, 1)
    onsets = np.arange(0, n_tokens, block)
    which = [i % len(conditions) for i in range(len(onsets))]
    for onset, k in zip(onsets, which):
        task[onset : onset + block, k] = 1
    durations = np.minimum(block, n_tokens - onsets)
    names = [conditions[k] for k in which]
    return pd.DataFrame({"onset": onsets, "duration": durations, "trial_type": names}), task
