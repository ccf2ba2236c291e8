"""How many components: minimum description length on independent samples, and parallel analysis."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from llmbrain._validation import legacy_generator
from llmbrain.decomposition.prepare.pca import gram
from llmbrain.decomposition.prepare.preprocess import PreparedRun

_MAX_NEURONS = 4096  # for parallel analysis
_COLOR = 0.3  # correlation of neighboring tokens up to which the description length needs no whitening
_LEFT = {"auto": 0.2, "parallel": 0.4}  # what may be left of it
_LAGS = 5
_IID_ENTROPY = 1.40  # of at most log(2 pi e) / 2 = 1.419 nats; Li et al. 2007 call a sample independent close to it


def estimate_order(
    runs: Iterator[PreparedRun],
    columns: slice,
    *,
    random_state: int | np.random.Generator | np.random.RandomState | None = 0,
    lattice: np.ndarray | None = None,
) -> dict[str, Any]:
    """Number of components of some neurons by both criteria: the median over runs, and each run's own.

    Returns
    -------
    dict
        ``mdl`` and ``parallel`` (int), ``mdl_per_run``, ``parallel_per_run``, ``subsampling_per_run`` (lists of int),
        ``autocorrelation`` of neighboring tokens, and ``color_left`` (float): the largest autocorrelation at lags 1 to
        5 after one AR(1) model of all neurons was taken out; both criteria find too many where it is high.
    """
    rng = legacy_generator(random_state)
    mdl, parallel, depths, color, left = [], [], [], [], []
    for run in runs:
        live = run.live[columns].cpu().numpy()
        data = run.matrix(columns)[:, run.live[columns]]
        places = np.flatnonzero(live)[:, None] if lattice is None else lattice[live]
        color.append(autocorrelation(data)[0])
        white = whitened(data, color[-1])
        order, depth = mdl_order(white if color[-1] > _COLOR else data, places)
        mdl.append(order)
        depths.append(depth)
        parallel.append(parallel_order(white, rng))
        left.append(float(autocorrelation(white).max()))
    return {
        "mdl": int(np.median(mdl)),
        "parallel": int(np.median(parallel)),
        "mdl_per_run": mdl,
        "parallel_per_run": parallel,
        "subsampling_per_run": depths,
        "autocorrelation": float(np.median(color)),
        "color_left": float(np.median(left)),
    }


def warn_of_color(estimates: dict[str, Any], criterion: str) -> None:
    """Warn where tokens stay more alike than `criterion` ("auto" or "parallel") can take."""
    seen = estimates["color_left"]
    if seen > _LEFT[criterion]:
        warnings.warn(
            f"n_components={criterion!r}: tokens correlate with those near them by up to {seen:.2f} beyond an AR(1) "
            "model of all neurons, and this criterion finds too many components then. Give a number; "
            "model_order_sweep helps to choose",
            UserWarning,
            stacklevel=5,
        )


def autocorrelation(data: torch.Tensor) -> np.ndarray:
    """Autocorrelation over tokens at lags 1 to 5, of all neurons together."""
    rows = data.double() - data.double().mean(dim=0, keepdim=True)
    power = max(float(rows.square().sum()), 1e-300)
    lags = range(1, min(_LAGS, len(rows) - 2) + 1)
    return np.array([float((rows[lag:] * rows[:-lag]).sum()) / power for lag in lags] or [0.0])


def whitened(data: torch.Tensor, color: float) -> torch.Tensor:
    """A run without the memory from token to token that all neurons share, standardized again: one token shorter.

    A filter over tokens leaves the rank of what components add, and makes noise of this color white.
    """
    rows = data[1:] - color * data[:-1]
    rows = rows - rows.mean(dim=0, keepdim=True)
    rows = rows / rows.std(dim=0, keepdim=True).clamp(min=1e-12)
    return rows - rows.mean(dim=1, keepdim=True)


def mdl_order(data: torch.Tensor, lattice: np.ndarray | None = None) -> tuple[int, int]:
    """Order by minimum description length (Wax & Kailath 1985; for ICA of fMRI, Li, Adali & Calhoun 2007, HBM 28).

    Parameters
    ----------
    data : Tensor (n_tokens, n_neurons)
        One centred run; neurons are the samples, unless there are more tokens than neurons: then tokens are.
    lattice : int array (n_neurons, n_axes), optional
        Where the samples lie. Neighbours that resemble each other are no independent samples, so only every so many
        along each axis are used; how many is found from the entropy rate of the most Gaussian components.

    Returns
    -------
    order, depth : int, int
        ``depth`` is the step of the subsampling: 1 keeps every sample.
    """
    if data.shape[0] > data.shape[1]:  # what there is more of are the samples: here the tokens
        data, lattice = data.T.contiguous(), None
    lattice = np.arange(data.shape[1])[:, None] if lattice is None else lattice
    values, vectors = torch.linalg.eigh(gram(data))
    depth = _independent_step(_gaussian_maps(data, values, vectors), lattice)
    if depth > 1:
        chosen = (lattice % depth == 0).all(axis=1)
        data = data[:, torch.from_numpy(chosen).to(data.device)]
        values = torch.linalg.eigvalsh(gram(data - data.mean(dim=1, keepdim=True)))
    n_samples = data.shape[1] - 1
    rank = min(data.shape[0], n_samples) - 1  # one dimension went with each mean
    # the smallest eigenvalues of a nearly square matrix are all sampling error: the theory below is useless there
    p = int(rank * min(1.0, 1.5 - rank / n_samples))
    spectrum = values.flip(0)[:p].cpu().numpy().clip(min=1e-12 * float(values[-1])) / n_samples
    # noise eigenvalues of finite samples spread around their mean: undo the spread that theory expects
    spectrum = spectrum / _noise_quantiles(rank, n_samples)[:p]
    tail = np.cumsum(spectrum[::-1])[::-1]
    log_tail = np.cumsum(np.log(spectrum[::-1]))[::-1]
    k = np.arange(p)
    left = p - k
    log_ratio = log_tail / left - np.log(tail / left)  # geometric over arithmetic mean of what is left as noise
    free = 1 + 0.5 * k * (2 * p - k + 1)
    length = -0.5 * n_samples * left * log_ratio + 0.5 * free * np.log(n_samples)
    return max(int(np.argmin(length[:-1])), 1), depth


def _noise_quantiles(p: int, n: int) -> np.ndarray:
    """Expected eigenvalues, falling, of the covariance of p unit series of n samples (Marchenko & Pastur 1967)."""
    if p > n:
        return np.concatenate([_noise_quantiles(n, p) * p / n, np.ones(p - n)])
    ratio = p / n
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    angle = np.linspace(0, np.pi, 4001)
    value = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    density = ((high - low) / 2 * np.sin(angle)) ** 2 / value.clip(min=1e-12)
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.interp(1 - (np.arange(p) + 0.5) / p, cumulative / cumulative[-1], value).clip(min=1e-3)


def _gaussian_maps(data: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor, n_maps: int = 6) -> np.ndarray:
    """Principal component maps that look most like noise: the smallest |kurtosis|, of those with variance."""
    keep = values > 1e-6 * values[-1]
    maps = (vectors[:, keep].T.to(data.dtype) @ data).double()
    maps = (maps - maps.mean(dim=1, keepdim=True)) / maps.std(dim=1, keepdim=True)
    kurtosis = (maps.pow(4).mean(dim=1) - 3).abs()
    return maps[kurtosis.argsort()[:n_maps]].cpu().numpy()


def _independent_step(maps: np.ndarray, lattice: np.ndarray, max_step: int = 8) -> int:
    """Smallest step along the lattice at which the median entropy rate of `maps` is that of independent samples."""
    for step in range(1, max_step + 1):
        chosen = (lattice % step == 0).all(axis=1)
        if chosen.sum() < 200:
            return max(step - 1, 1)
        if np.median([_entropy_rate(row, lattice[chosen], step) for row in maps[:, chosen]]) >= _IID_ENTROPY:
            return step
    return max_step


def _entropy_rate(values: np.ndarray, lattice: np.ndarray, step: int, max_lag: int = 16) -> float:
    """Entropy rate in nats of a Gaussian series of unit variance with the autocorrelation seen along the lattice axes.

    Kolmogorov's formula, ``log(2 pi e) / 2`` plus half the mean log spectrum; autocorrelation with a Parzen window.
    Axes add up: what one axis predicts, another does not predict again.
    """
    values = (values - values.mean()) / values.std()
    shape = lattice.max(axis=0) // step + 1
    strides = np.concatenate([np.cumprod(shape[::-1])[::-1][1:], [1]])
    flat = (lattice // step) @ strides
    grid = np.full(int(shape.prod()), np.nan)
    grid[flat] = values
    grid = grid.reshape(shape)
    rate = 0.5 * np.log(2 * np.pi * np.e)
    for axis in range(lattice.shape[1]):
        lags = min(max_lag, shape[axis] - 1)
        if lags < 2:
            continue
        line = np.moveaxis(grid, axis, 0)
        correlation = np.array([np.nanmean(line[: len(line) - lag] * line[lag:]) for lag in range(lags)])
        correlation = np.nan_to_num(correlation / correlation[0])
        place = np.arange(lags) / lags
        window = np.where(place <= 0.5, 1 - 6 * place**2 * (1 - place), 2 * (1 - place) ** 3)
        frequency = np.linspace(0, np.pi, 256)
        spectrum = 1 + 2 * (correlation[1:] * window[1:]) @ np.cos(np.outer(np.arange(1, lags), frequency))
        rate += 0.5 * np.log(spectrum.clip(min=1e-3)).mean()
    return float(rate)


def parallel_order(
    data: torch.Tensor, random_state: np.random.RandomState, *, n_draws: int = 10, quantile: float = 0.95
) -> int:
    """Order by parallel analysis (Horn 1965): leading components with more variance than chance gives.

    Chance: every neuron's time course shifted in a circle by its own random number of tokens, which keeps its
    autocorrelation and its distribution, and breaks what neurons share.
    """
    n_tokens, n_neurons = data.shape
    if n_neurons > _MAX_NEURONS:
        chosen = np.sort(random_state.choice(n_neurons, _MAX_NEURONS, replace=False))
        data = data[:, torch.from_numpy(chosen).to(data.device)]
        n_neurons = _MAX_NEURONS

    def spectrum(rows: torch.Tensor) -> np.ndarray:
        rows = rows - rows.mean(dim=1, keepdim=True)
        small = gram(rows if n_tokens <= n_neurons else rows.T.contiguous())
        return torch.linalg.eigvalsh(small).flip(0).cpu().numpy()

    observed = spectrum(data)
    time = torch.arange(n_tokens, device=data.device)[:, None]
    null = []
    for _ in range(n_draws):
        shift = torch.from_numpy(random_state.randint(0, n_tokens, size=n_neurons)).to(data.device)
        null.append(spectrum(data.gather(0, (time + shift) % n_tokens)))
    above = observed > np.quantile(null, quantile, axis=0)
    return max(int(above.argmin()) if not above.all() else above.size, 1)
