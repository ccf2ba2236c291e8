"""ICA solvers, and the table of them: a new one is a file here and a row of `SOLVERS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from llmbrain.decomposition.prepare.pca import Whitened, project
from llmbrain.decomposition.solvers.clustering import cluster_maps, part_maps
from llmbrain.decomposition.solvers.dictlearning import dictionary_maps
from llmbrain.decomposition.solvers.fastica import fastica, negentropy, random_start
from llmbrain.decomposition.solvers.picard import picard
from llmbrain.decomposition.solvers.result import Unmixed

__all__ = ["SOLVERS", "Settings", "Solver", "Unmixed", "unmix"]


@dataclass(frozen=True)
class Settings:
    """Which solver, and its settings: see `GroupICA`."""

    method: str = "fastica"
    fun: str = "logcosh"
    n_init: int = 1
    max_iter: int = 200
    tol: float = 1e-5


@dataclass(frozen=True)
class Solver:
    """A row of `SOLVERS`: one of the two functions.

    Attributes
    ----------
    from_start : callable, optional
        ``(white, start, settings, n_samples) -> Unmixed``: an ICA of white data from one random start.
    whole_group : callable, optional
        ``(group, live, random_state) -> (maps, Unmixed)``: maps of the group's principal components, for what is no
        rotation of white data. Such a solver finds maps only (``axis="space"``) and has no random starts to compare.
    """

    from_start: Callable[[torch.Tensor, np.ndarray, Settings, int | None], Unmixed] | None = None
    whole_group: Callable[[Whitened, torch.Tensor, np.random.RandomState], tuple[torch.Tensor, Unmixed]] | None = None


def _fastica(white: torch.Tensor, start: np.ndarray, settings: Settings, n_samples: int | None) -> Unmixed:
    return fastica(
        white, fun=settings.fun, w_init=start, max_iter=settings.max_iter, tol=settings.tol, n_samples=n_samples,
        warn=False,
    )  # fmt: skip


def _picard(white: torch.Tensor, start: np.ndarray, settings: Settings, n_samples: int | None) -> Unmixed:
    return picard(white, settings.fun, start, settings.max_iter, settings.tol)


SOLVERS: dict[str, Solver] = {
    "fastica": Solver(_fastica),
    "picard": Solver(_picard),
    "dictlearning": Solver(whole_group=dictionary_maps),
    "kmeans": Solver(whole_group=cluster_maps),
    "nmf": Solver(whole_group=part_maps),
}


def unmix(
    white: torch.Tensor, settings: Settings, random_state: np.random.RandomState, n_samples: int | None = None
) -> Unmixed:
    """ICA of (k, n) white data from ``settings.n_init`` random starts; that of the largest negentropy is kept.

    `n_samples` counts the columns that are not constant 0, when some are.
    """
    solve = SOLVERS[settings.method].from_start
    assert solve is not None  # the others have no white data to unmix
    best: Unmixed | None = None
    scores: list[float] = []
    tried: list[Unmixed] = []
    for _ in range(settings.n_init):
        found = solve(white, random_start(len(white), random_state), settings, n_samples)
        tried.append(found)
        score = 0.0
        if settings.n_init > 1:
            sources = project(torch.from_numpy(found.unmixing).to(white.device), white)
            score = negentropy(sources, settings.fun, n_samples=n_samples)
            scores.append(score)
        if best is None or score > max(scores[:-1], default=-1.0):
            best = found
    assert best is not None
    best.scores = scores
    best.start_iterations = [found.n_iter for found in tried]
    best.start_converged = [found.converged for found in tried]
    return best
