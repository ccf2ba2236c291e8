"""First pass of group ICA: every run to its leading components, stacked over runs, one stack a window of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmbrain._validation import InputError
from llmbrain.decomposition.prepare.pca import GroupPCA, Whitened, gram, pca_of_run, symmetric_eigen, whiten
from llmbrain.decomposition.prepare.preprocess import PreparedRun
from llmbrain.decomposition.prepare.source import Source

_SHARE_ROWS = 500  # rows kept between runs when the number of components is not known before the last run


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
    if width < 2:
        raise InputError(f"{source.runs.name(0)} has a single neuron (n_features=1): a map needs at least 2")
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


def reduced_run(
    run: PreparedRun, columns: slice, n_components: int | float, cca: bool, center: bool = True
) -> tuple[torch.Tensor, float]:
    """A run's leading principal components (k, n_columns), and its whole variance.

    Each is as long as its singular value, or with `cca` of unit length: only what runs share counts then (Varoquaux et
    al. 2010).
    """
    pca = pca_of_run(run, columns, n_components, center=center)
    rows = pca.rows
    if cca:
        rows = rows / pca.eigenvalues[: len(rows)].sqrt()[:, None].to(rows.dtype)
    return rows, pca.total


def reduce_runs(
    source: Source,
    windows: list[Window],
    run_components: int | None,
    cca: bool,
    *,
    center: bool = True,
    max_rows: int | None = None,
) -> Reduced:
    """First pass: every run to its leading components, stacked over runs (Smith et al. 2014), one stack a window.

    Parameters
    ----------
    run_components : int or None
        Components kept of each run; None: see `default_run_components`.
    cca : bool
        See `reduced_run`.
    center : bool
        Whether every token is centred over neurons first.
    max_rows : int, optional
        Rows kept between runs; the default is enough for the windows' numbers of components.
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
            stacks.append(GroupPCA(max_rows or max(2 * size, 4 * k)))
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
            rows, total = reduced_run(run, window.columns, sizes[i], cca, center)
            variance[i] += total
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


def group_subspace(stack: torch.Tensor, k: int, live: torch.Tensor, *, center: bool = True) -> Whitened:
    """The leading `k` components of a stack, white over the live neurons.

    Where tokens were not centred (`center` False) the components are, once they are chosen, as ICA needs it.
    """
    n_live = int(live.sum())
    group = whiten(stack, k, n_samples=n_live)
    if center:
        return group
    rows = group.data - (group.data.sum(dim=1, keepdim=True, dtype=torch.float64) / n_live).to(group.data.dtype)
    return whiten(rows * live, k, n_samples=n_live)


def components_for_share(stack: torch.Tensor, variance: float, share: float) -> int:
    """How many of the stack's principal components hold this share of the runs' variance."""
    values, _ = symmetric_eigen(gram(stack))
    held = torch.cumsum(values, 0).cpu().numpy() / variance
    if held[-1] < share:
        raise InputError(f"n_components={share}: the reduced runs hold only {held[-1]:.3f} of the variance")
    return int(np.searchsorted(held, share)) + 1
