"""The algorithms behind `GroupICA`: FastICA, picard and nilearn's dictionary learning, with one kind of result."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from llmbrain._validation import soft_import
from llmbrain.decomposition.prepare.pca import Whitened, project
from llmbrain.decomposition.solvers.fastica import fastica, negentropy, random_start

METHODS = ("fastica", "picard", "dictlearning")


@dataclass
class Unmixed:
    """What one decomposition found: see `ICAResult`; `scores` are the negentropies of all starts."""

    unmixing: np.ndarray
    n_iter: int
    converged: bool
    change: float = 0.0
    scores: list[float] = field(default_factory=list)


@dataclass
class Algorithm:
    """Which ICA, and its settings: see `GroupICA`."""

    method: str
    fun: str
    n_init: int
    max_iter: int
    tol: float
    random_state: np.random.RandomState

    def unmix(self, white: torch.Tensor, n_samples: int | None = None) -> Unmixed:
        """Call `unmix` with these settings."""
        return unmix(
            white,
            method=self.method,
            fun=self.fun,
            n_init=self.n_init,
            max_iter=self.max_iter,
            tol=self.tol,
            random_state=self.random_state,
            n_samples=n_samples,
        )


def unmix(
    white: torch.Tensor,
    *,
    method: str,
    fun: str,
    n_init: int,
    max_iter: int,
    tol: float,
    random_state: np.random.RandomState,
    n_samples: int | None = None,
) -> Unmixed:
    """ICA of (k, n) white data from `n_init` random starts; the start of the largest negentropy is kept.

    `n_samples` counts the columns that are not constant 0, when some are.
    """
    best: Unmixed | None = None
    scores = []
    for _ in range(n_init):
        start = random_start(len(white), random_state)
        if method == "picard":
            found = _picard(white, fun, start, max_iter, tol)
        else:
            result = fastica(white, fun=fun, w_init=start, max_iter=max_iter, tol=tol, n_samples=n_samples, warn=False)
            found = Unmixed(result.unmixing, result.n_iter, result.converged, result.change)
        score = 0.0
        if n_init > 1:
            sources = project(torch.from_numpy(found.unmixing).to(white.device), white)
            score = negentropy(sources, fun, n_samples=n_samples)
            scores.append(score)
        if best is None or score > max(scores[:-1], default=-1.0):
            best = found
    assert best is not None
    best.scores = scores
    return best


def _picard(white: torch.Tensor, fun: str, start: np.ndarray, max_iter: int, tol: float) -> Unmixed:
    """Picard-O with the density switch that makes it find FastICA's solution (Ablin, Cardoso & Gramfort 2018)."""
    picard = soft_import("picard", "picard", "method='picard'")
    densities = soft_import("picard.densities", "picard", "method='picard'")
    density = {"logcosh": densities.Tanh, "exp": densities.Exp, "cube": densities.Cube}[fun]
    density = density(params={"alpha": 1.0}) if fun == "exp" else density()
    left, _, right = np.linalg.svd(start)  # it wants an orthogonal start
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # its tolerance is on the gradient: the square root of FastICA's (picard's documentation)
        _, unmixing, _, n_iter = picard.picard(
            white.double().cpu().numpy(),
            fun=density,
            check_fun=False,
            ortho=True,
            extended=True,
            whiten=False,
            centering=False,
            w_init=left @ right,
            max_iter=max_iter,
            tol=tol**0.5,
            return_n_iter=True,
        )
    failed = any("converge" in str(warning.message).lower() for warning in caught)
    return Unmixed(np.asarray(unmixing, dtype=np.float64), int(n_iter) + 1, not failed, tol**0.5 if failed else 0.0)


def dictionary_maps(
    group: Whitened, live: torch.Tensor, random_state: np.random.RandomState
) -> tuple[torch.Tensor, Unmixed]:
    """nilearn's DictLearning on the group's principal components: sparse maps (k, n_neurons)."""
    from nibabel import Nifti1Image
    from nilearn.decomposition import DictLearning

    k = len(group.data)
    used = live.cpu().numpy()
    # components as long as their singular values, as nilearn's own reduction leaves them
    rows = (group.data * group.eigenvalues[:k].sqrt()[:, None].to(group.data)).cpu().numpy()[:, used]
    side = int(np.ceil(np.sqrt(rows.shape[1])))
    mask = np.zeros(side * side, dtype=np.int8)
    mask[: rows.shape[1]] = 1
    volume = np.zeros((side * side, k))  # float64: its lasso does not converge on less
    volume[: rows.shape[1]] = rows.T
    image = Nifti1Image(volume.reshape(side, side, 1, k), np.eye(4))
    learner = DictLearning(
        n_components=k,
        mask=Nifti1Image(mask.reshape(side, side, 1), np.eye(4)),
        smoothing_fwhm=None,
        standardize=None,
        standardize_confounds=False,
        detrend=False,
        reduction_ratio=1.0,
        random_state=random_state.randint(2**31 - 1),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner.fit([image])
    failed = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    maps = torch.zeros((k, used.size), dtype=group.data.dtype)
    maps[:, torch.from_numpy(used)] = torch.from_numpy(np.asarray(learner.components_)).to(maps)
    empty = int((maps.abs().sum(dim=1) == 0).sum())
    if empty:
        warnings.warn(
            f"dictionary learning left {empty} of {k} maps empty: lower n_components", UserWarning, stacklevel=2
        )
    return maps.to(group.data.device), Unmixed(np.eye(k), 1, not failed)
