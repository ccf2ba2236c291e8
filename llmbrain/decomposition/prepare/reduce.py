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
from llmbrain.distributed import ALONE, Parcel, Ranks

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
    team: Ranks = ALONE,
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
    team : Ranks
        Each rank reduces its share of the runs, then what they hold is joined as a tree: rank 0 gets the stacks, the
        others none. No rank ever holds more than two states of ``2 max_rows`` rows.
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
    width = source.runs.n_neurons
    assert width is not None  # known since the windows were cut
    live = torch.zeros(width, dtype=torch.bool, device=source.device)
    told: dict[int, dict[str, Any]] = {}  # by run
    mine = team.mine(len(source.runs))
    for run in source.prepared("reduce", among=mine):
        number = mine[len(told)]
        live |= run.live
        totals = [0.0] * len(windows)
        for i, window in enumerate(windows):
            if not bool(run.live[window.columns].any()):
                continue  # nothing of this run in these layers
            rows, totals[i] = reduced_run(run, window.columns, sizes[i], cca, center)
            stacks[i].add(rows, number)
        told[number] = {"n_tokens": run.n_kept, "report": run.report, "variance": totals}
        del run  # before the next is read
    live, told = _joined(team, stacks, live, told)
    known = [told[number] for number in range(len(source.runs))]
    n_tokens = sum(run["n_tokens"] for run in known)
    variance = [sum(run["variance"][i] for run in known) for i in range(len(windows))]
    for window in windows:
        width = window.columns.stop - window.columns.start
        if not isinstance(window.n_components, float) and window.n_components > min(n_tokens, width):
            raise InputError(
                f"n_components={window.n_components} is more than the data allow: {n_tokens} tokens are fitted over "
                f"{width} neurons"
            )
        if not bool(live[window.columns].any()):
            raise InputError(f"layers {window.layers} have no neuron that varies: leave them out with a mask and scope")
    held = [stack.stack() for stack in stacks] if team.leads else []
    return Reduced(held, variance, live, [run["report"] for run in known], n_tokens)


def _joined(
    team: Ranks, stacks: list[GroupPCA], live: torch.Tensor, told: dict[int, dict[str, Any]]
) -> tuple[torch.Tensor, dict[int, dict[str, Any]]]:
    """Join the states of all ranks as a tree, into those of rank 0; what runs say is known to all afterwards."""
    if team.size == 1:
        return live, told
    step = 1
    while step < team.size and team.rank % step == 0:
        if team.rank % (2 * step):
            held = {f"{i} {number} {j}": rows for i, stack in enumerate(stacks) for j, (number, rows) in
                    enumerate(stack.parts)}  # fmt: skip
            team.send(team.rank - step, "group PCA", Parcel({**held, "live": live}, list(told.items())))
            for stack in stacks:
                stack.parts = []
        elif team.rank + step < team.size:
            parcel = team.receive(team.rank + step, "group PCA")
            live |= parcel.tensors.pop("live").to(live.device)
            told |= {int(number): run for number, run in parcel.record}
            for name in list(parcel.tensors):
                i, number, _ = (int(part) for part in name.split())
                stacks[i].add(parcel.tensors.pop(name).to(live.device), number)
        step *= 2
    whole = team.found_by(0, "group PCA", lambda: Parcel({"live": live}, list(told.items())))
    return whole.tensors["live"].to(live.device), {int(number): run for number, run in whole.record}


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
