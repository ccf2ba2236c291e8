"""What every solver returns, and how it says that it did not converge."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np
from sklearn.exceptions import ConvergenceWarning


@dataclass
class Unmixed:
    """What an ICA found.

    Attributes
    ----------
    unmixing : float64 array (k, k)
        ``sources = unmixing @ white``; rows are orthonormal for FastICA.
    n_iter : int
    converged : bool
    change : float
        Largest ``1 - |cos|`` between a row and its successor in the last step; what else a solver stops at, for others.
    scores : list of float
        Negentropy that each random start reached, where there were several.
    start_iterations : list of int
        Steps of each random start.
    start_converged : list of bool
        Which of them converged.
    """

    unmixing: np.ndarray
    n_iter: int
    converged: bool
    change: float = 0.0
    scores: list[float] = field(default_factory=list)
    start_iterations: list[int] = field(default_factory=list)
    start_converged: list[bool] = field(default_factory=list)


def warn_not_converged(method: str, max_iter: int, change: float, tol: float) -> None:
    """One wording for all solvers: what happened, and which number to change."""
    warnings.warn(
        f"{method} did not converge in max_iter={max_iter} steps (last change {change:.2g}, tol={tol:g}): raise "
        "max_iter, or lower n_components; maps of an unconverged fit are not reliable",
        ConvergenceWarning,
        stacklevel=3,
    )
