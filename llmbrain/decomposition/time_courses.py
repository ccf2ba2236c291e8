"""Units and sign of component maps, and the time courses that go with them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from llmbrain._progress import bar
from llmbrain.decomposition.prepare.pca import gram
from llmbrain.decomposition.prepare.preprocess import PreparedRun
from llmbrain.decomposition.prepare.source import Source
from llmbrain.decomposition.workers import workers
from llmbrain.distributed import ALONE, Parcel, Ranks


def standardize_maps(maps: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Maps (K, n_neurons) with zero mean and unit variance (ddof 0) over the live neurons and 0 on the others.

    The sign is the one that makes the largest absolute value positive.
    """
    n_live = int(live.sum())
    out = torch.empty_like(maps)
    for row, done in zip(maps, out):  # one map at a time: no float64 copy of all
        used = row.double() * live
        used = (used - used.sum() / n_live) * live
        used /= (used.square().sum() / n_live).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        done.copy_(-used if used[used.abs().argmax()] < 0 else used)
    return out


class Regressor:
    """Least squares of tokens on fixed maps, over neurons; tokens and maps are centred over the live neurons.

    Parameters
    ----------
    maps : Tensor (K, n_columns)
        With zero mean over the neurons used.
    columns : slice, optional
        Which neurons of a run they are for; all by default.
    """

    def __init__(self, maps: torch.Tensor, columns: slice | None = None) -> None:
        self.maps, self.columns = maps, columns or slice(0, maps.shape[1])
        self.gram = gram(maps)
        self.inverse = torch.linalg.pinv(self.gram, hermitian=True)

    def products(self, run: PreparedRun) -> torch.Tensor:
        """Products (n_tokens, K) in float64 of every token, centred over the run's live neurons, with the maps."""
        first = self.columns.start
        live = run.live[self.columns]

        def block(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
            y = run.block(slice(first + part.start, first + part.stop))
            return y @ self.maps[:, part].T, y.sum(dim=1)

        with workers(run.device) as team:
            found, sums = team.sum(block, self.maps.shape[1], rows=run.n_tokens)
        # maps have zero mean over the group's neurons; only a run with fewer live ones needs this correction
        weight = (self.maps.double() * live).sum(dim=1)
        return found - torch.outer(sums / int(live.sum()), weight)

    def time_courses(self, run: PreparedRun) -> torch.Tensor:
        """Time courses (n_tokens, K) in float64: ``run ~ time_courses @ maps``."""
        return self.products(run) @ self.inverse


def regress(
    source: Source, maps: list[torch.Tensor], columns: list[slice], step: str, team: Ranks = ALONE
) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Second pass: for every run the time courses on the maps, and the variance that these explain.

    Each rank of a team reads its share of the runs; all get all time courses.

    Yields
    ------
    time_courses : float64 array (n_tokens, n_components)
    alone : float64 array (n_components,)
        Variance over the kept tokens that each component explains by itself.
    joint : float
        Variance that all explain together.
    """
    regressors = [Regressor(part, where) for part, where in zip(maps, columns)]

    def of_run(index: int) -> Parcel:
        run = source.read(index)
        kept = torch.from_numpy(run.keep).to(run.device)
        courses, alone, joint = [], [], 0.0
        for regressor in regressors:
            products = regressor.products(run)
            found = products @ regressor.inverse
            courses.append(found)
            shared = (found * products)[kept].sum(dim=0)
            joint += float(shared.sum())
            alone.append(2 * shared - found[kept].square().sum(dim=0) * regressor.gram.diagonal())
        return Parcel({"courses": torch.cat(courses, dim=1).cpu(), "alone": torch.cat(alone).cpu()}, joint)

    n = len(source.runs)
    for parcel in bar(team.each(n, step, of_run), total=n, desc=step, unit="run", show=source.progress):
        yield parcel.tensors["courses"].numpy(), parcel.tensors["alone"].numpy(), float(parcel.record)
