"""Picard: FastICA's solution in fewer, quasi-Newton steps (optional package)."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from llmbrain._validation import soft_import
from llmbrain.decomposition.solvers.result import Unmixed


def picard(white: torch.Tensor, fun: str, start: np.ndarray, max_iter: int, tol: float) -> Unmixed:
    """Picard-O with the density switch that makes it find FastICA's solution (Ablin, Cardoso & Gramfort 2018)."""
    package = soft_import("picard", "picard", "method='picard'")
    densities = soft_import("picard.densities", "picard", "method='picard'")
    density = {"logcosh": densities.Tanh, "exp": densities.Exp, "cube": densities.Cube}[fun]
    density = density(params={"alpha": 1.0}) if fun == "exp" else density()
    left, _, right = np.linalg.svd(start)  # it wants an orthogonal start
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # its tolerance is on the gradient: the square root of FastICA's (picard's documentation)
        _, unmixing, _, n_iter = package.picard(
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
