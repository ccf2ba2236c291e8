"""Sparse maps by nilearn's dictionary learning."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from llmbrain.decomposition.prepare.pca import Whitened
from llmbrain.decomposition.solvers.fastica import fastica
from llmbrain.decomposition.solvers.result import Unmixed


def dictionary_maps(
    group: Whitened, live: torch.Tensor, random_state: np.random.RandomState
) -> tuple[torch.Tensor, Unmixed]:
    """nilearn's DictLearning on the group's principal components: sparse maps (k, n_neurons).

    It begins with maps of FastICA (cube), as nilearn's does: with ours, since nilearn's own whitens components that are
    white already, and where it begins would hang on rounding.
    """
    from nibabel import Nifti1Image
    from nilearn.decomposition import DictLearning

    k = len(group.data)
    used = live.cpu().numpy()
    # components as long as their singular values, as nilearn's own reduction leaves them
    rows = (group.data * group.eigenvalues[:k].sqrt()[:, None].to(group.data)).cpu().numpy()[:, used]
    side = int(np.ceil(np.sqrt(rows.shape[1])))
    mask = np.zeros(side * side, dtype=np.int8)
    mask[: rows.shape[1]] = 1

    def image(values: np.ndarray) -> Nifti1Image:
        volume = np.zeros((side * side, k))  # float64: its lasso does not converge on less
        volume[: values.shape[1]] = values.T
        return Nifti1Image(volume.reshape(side, side, 1, k), np.eye(4))

    white = group.data[:, live].double()
    start = fastica(white, fun="cube", random_state=random_state, warn=False).unmixing @ white.cpu().numpy()
    learner = DictLearning(
        n_components=k,
        mask=Nifti1Image(mask.reshape(side, side, 1), np.eye(4)),
        smoothing_fwhm=None,
        standardize=None,
        standardize_confounds=False,
        detrend=False,
        reduction_ratio=1.0,
        random_state=random_state.randint(2**31 - 1),
        dict_init=image(start),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner.fit([image(rows)])
    failed = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    maps = torch.zeros((k, used.size), dtype=group.data.dtype)
    maps[:, torch.from_numpy(used)] = torch.from_numpy(np.asarray(learner.components_)).to(maps)
    empty = int((maps.abs().sum(dim=1) == 0).sum())
    if empty:
        warnings.warn(
            f"dictionary learning left {empty} of {k} maps empty: lower n_components", UserWarning, stacklevel=2
        )
    return maps.to(group.data.device), Unmixed(np.eye(k), 1, not failed)
