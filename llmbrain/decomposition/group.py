"""The steps of group ICA on prepared runs, in order: reduce and stack, decompose, regress."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from llmbrain._validation import InputError
from llmbrain.decomposition.maps import Regressor
from llmbrain.decomposition.prepare.pca import GroupPCA, gram, pca_of_run, project, symmetric_eigen, whiten
from llmbrain.decomposition.prepare.preprocess import PreparedRun, Preprocessing, Statistics, prepare
from llmbrain.decomposition.solvers.methods import Algorithm, Unmixed, dictionary_maps
from llmbrain.scanning.inputs import Runs

_SHARE_ROWS = 500  # rows kept between runs when the number of components is not known before the last run


@dataclass
class Source:
    """Runs and how to prepare them; every iteration reads them again, one at a time."""

    runs: Runs
    settings: Preprocessing
    device: torch.device
    dtype: torch.dtype
    mask: np.ndarray | None = None
    progress: bool = False
    _statistics: dict[int, Statistics] = field(default_factory=dict)

    def prepared(self, step: str, limit: int | None = None) -> Iterator[PreparedRun]:
        """Yield every run, preprocessed; `step` is what the progress bar says."""
        indices: Any = range(len(self.runs))[:limit]
        if self.progress:
            from tqdm.auto import tqdm

            indices = tqdm(indices, desc=step, unit="run")
        for index in indices:
            yield self._read(index)  # no name here keeps the last run in memory while the next is read

    def _read(self, index: int) -> PreparedRun:
        known = self._statistics.get(index)
        data = self.runs.read(index, check=known is None)
        run = prepare(
            data,
            self.settings,
            device=self.device,
            dtype=self.dtype,
            positions=self.runs.positions(index),
            neurons=self._neurons(data.shape[1]),
            name=self.runs.name(index),
            statistics=known,
        )
        if not bool(run.live.any()):
            raise InputError(f"{self.runs.name(index)} has no variance: all its neurons are constant over tokens")
        # what was measured is kept for the next pass, up to the size of one run: memory does not grow with runs
        if known is None and len(self._statistics) < run.n_tokens // (8 + self.settings.degree):
            self._statistics[index] = run.statistics
        return run

    def _neurons(self, n_neurons: int) -> torch.Tensor | None:
        if self.mask is None:
            return None
        if self.mask.dtype != bool or self.mask.shape != (n_neurons,):
            raise InputError(
                f"mask has shape {self.mask.shape} and dtype {self.mask.dtype}: {n_neurons} bools are needed"
            )
        if not self.mask.any():
            raise InputError("mask removes everything: no neuron is True")
        return torch.from_numpy(self.mask).to(self.device)


@dataclass
class Window:
    """The neurons of one ICA.

    Attributes
    ----------
    columns : slice
        Of all neurons.
    layers : (int, int) or None
        First and last layer; None for the whole model.
    n_components : int or float
        How many components, or the share of variance.
    """

    columns: slice
    layers: tuple[int, int] | None
    n_components: int | float


def cut_windows(source: Source, scope: str | int) -> list[tuple[slice, tuple[int, int] | None]]:
    """Columns and layers of every window; reads the first run to know the neurons."""
    width = source.runs[0].shape[1]
    space = source.runs.space
    if scope == "model":
        return [(slice(0, width), None)]
    if space is None:
        raise InputError(f"scope={scope!r} needs to know the layers: pass scans, or fit(..., space=...)")
    size = 1 if isinstance(scope, str) else int(scope)
    windows: list[tuple[slice, tuple[int, int] | None]] = []
    for first in range(0, space.n_layers, size):
        last = min(first + size, space.n_layers) - 1
        windows.append((slice(space.layer_slice(first).start, space.layer_slice(last).stop), (first, last)))
    return windows


@dataclass
class Reduced:
    """What is left of all runs after the first pass.

    Attributes
    ----------
    stacks : list of Tensor (n_rows, n_columns)
        One a window: the group's components, each as long as its singular value.
    variance : list of float
        One a window: the whole variance of the runs.
    live : bool Tensor (n_neurons,)
        Neurons that vary in at least one run.
    reports : list of dict
        The preprocessing reports of the runs.
    n_tokens : int
        Kept tokens of all runs.
    """

    stacks: list[torch.Tensor]
    variance: list[float]
    live: torch.Tensor
    reports: list[dict[str, Any]]
    n_tokens: int


def default_run_components(n_components: int, cca: bool) -> int:
    """Components kept of each run: three for each one asked for, so that what is weak in every run is not cut off.

    With `cca` no more than asked for: it gives each the same weight, noise included.
    """
    return n_components if cca else 3 * n_components


def reduce_runs(source: Source, windows: list[Window], run_components: int | None, cca: bool) -> Reduced:
    """First pass: every run to its leading components, stacked over runs (Smith et al. 2014), one stack a window.

    Parameters
    ----------
    run_components : int or None
        Components kept of each run; None: see `default_run_components`.
    cca : bool
        Give a run's components unit length: only what runs share counts (Varoquaux et al. 2010).
    """
    sizes: list[int | float] = []
    stacks: list[GroupPCA] = []
    for window in windows:
        k = window.n_components
        if isinstance(k, float):
            sizes.append(run_components or (1 + k) / 2)
            stacks.append(GroupPCA(_SHARE_ROWS))
        else:
            size = run_components or default_run_components(k, cca)
            sizes.append(size)
            stacks.append(GroupPCA(max(2 * size, 4 * k)))
    variance = [0.0] * len(windows)
    live: torch.Tensor | None = None
    reports = []
    n_tokens = 0
    for run in source.prepared("reduce"):
        live = run.live if live is None else live | run.live
        n_tokens += run.n_kept
        reports.append(run.report)
        for i, window in enumerate(windows):
            if not bool(run.live[window.columns].any()):
                continue  # nothing of this run in these layers
            pca = pca_of_run(run, window.columns, sizes[i])
            variance[i] += pca.total
            rows = pca.rows
            if cca:
                rows = rows / pca.eigenvalues[: len(rows)].sqrt()[:, None].to(rows.dtype)
            stacks[i].add(rows)
        del run  # before the next is read
    assert live is not None  # Runs is never empty
    for window in windows:
        width = window.columns.stop - window.columns.start
        if not isinstance(window.n_components, float) and window.n_components > min(n_tokens, width):
            raise InputError(
                f"n_components={window.n_components} is more than the data allow: {n_tokens} tokens are fitted over "
                f"{width} neurons"
            )
        if not bool(live[window.columns].any()):
            raise InputError(f"layers {window.layers} have no neuron that varies: leave them out with a mask and scope")
    return Reduced([stack.stack() for stack in stacks], variance, live, reports, n_tokens)


def components_for_share(stack: torch.Tensor, variance: float, share: float) -> int:
    """How many of the stack's principal components hold this share of the runs' variance."""
    values, _ = symmetric_eigen(gram(stack))
    held = torch.cumsum(values, 0).cpu().numpy() / variance
    if held[-1] < share:
        raise InputError(f"n_components={share}: the reduced runs hold only {held[-1]:.3f} of the variance")
    return int(np.searchsorted(held, share)) + 1


def decompose(
    stack: torch.Tensor, k: int, live: torch.Tensor, algorithm: Algorithm, axis: str, source: Source, window: Window
) -> tuple[torch.Tensor, Unmixed]:
    """ICA of one window: maps (k, n_columns) in no particular units or order, and how it went."""
    n_live = int(live.sum())
    group = whiten(stack, k, n_samples=n_live)
    if algorithm.method == "dictlearning":
        return dictionary_maps(group, live, algorithm.random_state)
    if axis == "space":
        fit = algorithm.unmix(group.data, n_live)
        return project(torch.from_numpy(fit.unmixing).to(stack.device), group.data), fit
    # temporal: what is unmixed are the tokens' coordinates in the group's subspace
    basis = Regressor(group.data, window.columns)
    courses = [
        basis.time_courses(run)[torch.from_numpy(run.keep).to(stack.device)] for run in source.prepared("project")
    ]
    tokens = torch.cat(courses).T.contiguous()
    white = whiten(tokens - tokens.mean(dim=1, keepdim=True))
    fit = algorithm.unmix(white.data)
    mixing = white.dewhitening @ torch.from_numpy(fit.unmixing.T.copy()).to(stack.device)
    return project(mixing.T.contiguous(), group.data), fit


def regress(
    source: Source, maps: list[torch.Tensor], columns: list[slice], step: str
) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Second pass: for every run the time courses on the maps, and the variance that these explain.

    Yields
    ------
    time_courses : float64 array (n_tokens, n_components)
    alone : float64 array (n_components,)
        Variance over the kept tokens that each component explains by itself.
    joint : float
        Variance that all explain together.
    """
    regressors = [Regressor(part, where) for part, where in zip(maps, columns)]
    for run in source.prepared(step):
        kept = torch.from_numpy(run.keep).to(run.device)
        courses, alone, joint = [], [], 0.0
        for regressor in regressors:
            products = regressor.products(run)
            found = products @ regressor.inverse
            courses.append(found)
            shared = (found * products)[kept].sum(dim=0)
            joint += float(shared.sum())
            alone.append(2 * shared - found[kept].square().sum(dim=0) * regressor.gram.diagonal())
        del run  # before the next is read
        yield torch.cat(courses, dim=1).cpu().numpy(), torch.cat(alone).cpu().numpy(), joint
