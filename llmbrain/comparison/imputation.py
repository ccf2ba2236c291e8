"""What a regression took from a series, filled in again as a series of its memory would have it.

A null moves a series in time and cleans it of the nuisance again. What is left of a series after the nuisance lacks
what the nuisance explains at its own times, so that moving that alone loses twice, and the null gets too narrow (.19
for .05 with 14 smooth regressors at 200 volumes); moving the series with its nuisance takes its memory along, and the
null gets too narrow or too wide, as that is rougher or smoother than the rest (.69, .02). So the part that is missing
is drawn from its distribution given the rest, under an AR(1) model of each column.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, toeplitz

from llmbrain.brains.series import slow_cosines

Array = NDArray[np.float64]
GRID = (0.0, 0.2, 0.4, 0.55, 0.7, 0.8, 0.87, 0.92, 0.96, 0.98)
_LONGEST = 1500  # times up to which every value is tried; beyond, that of the lag-1 autocorrelation, which is sure then


def imputation(residual: Array, nuisance: Array, n_slow: int) -> Imputation:
    """An `Imputation` of a nuisance (orthonormal, with a constant) where slow cosines are missing too."""
    lost = slow_cosines(len(residual), n_slow + 1)
    own = nuisance - lost @ (lost.T @ nuisance)
    left, size, _ = np.linalg.svd(own, full_matrices=False)
    return Imputation(residual, left[:, size > 1e-8], lost)


class Imputation:
    """Draws of what `basis` took from `residual`, given what is left.

    Parameters
    ----------
    residual : array ``(n_times, n_columns)``
        Free of `basis` and of `lost`.
    basis : array ``(n_times, n_basis)``
        Orthonormal: what was regressed out and is filled in.
    lost : array ``(n_times, n_lost)``
        Orthonormal to `basis`: what is missing too and stays so (a constant, slow cosines).
    """

    def __init__(self, residual: Array, basis: Array, lost: Array) -> None:
        self.basis = basis
        known = np.column_stack([lost, basis])
        rest = np.linalg.qr(known, mode="complete")[0][:, known.shape[1] :]
        left = rest.T @ residual
        n_left = len(left)
        best = np.full(left.shape[1], -np.inf)
        self.mean = np.zeros((basis.shape[1], left.shape[1]))
        self.roots = np.zeros((left.shape[1], basis.shape[1], basis.shape[1]))
        for rho in GRID if len(residual) <= _LONGEST else _nearest(residual):
            memory = toeplitz(rho ** np.arange(len(residual)))
            inner = cho_factor(rest.T @ memory @ rest, lower=True)
            solved = cho_solve(inner, left)
            power = np.maximum((left * solved).sum(axis=0) / n_left, 1e-300)
            fit = -np.log(np.diag(inner[0])).sum() - 0.5 * n_left * np.log(power)
            better = fit > best
            if not better.any():
                continue
            best = np.where(better, fit, best)
            across = basis.T @ memory @ rest
            self.mean[:, better] = across @ solved[:, better]
            spread = basis.T @ memory @ basis - across @ cho_solve(inner, across.T)
            values, vectors = np.linalg.eigh(spread)
            root = vectors * np.sqrt(np.maximum(values, 0))
            self.roots[better] = np.sqrt(power[better])[:, None, None] * root
        together = np.nan_to_num(np.corrcoef(left.T)) if left.shape[1] > 1 else np.ones((1, 1))
        values, vectors = np.linalg.eigh(together)
        self.mixing = vectors * np.sqrt(np.maximum(values, 0))  # columns that go together are filled alike

    def draw(self, rng: np.random.Generator) -> Array:
        """``(n_times, n_columns)``, to be added to the residual."""
        white = rng.normal(size=self.mean.shape) @ self.mixing.T
        return np.asarray(self.basis @ (self.mean + np.einsum("kij,jk->ik", self.roots, white)))


def _nearest(residual: Array) -> list[float]:
    """Values of the grid that are nearest to the lag-1 autocorrelation of some column."""
    power = np.maximum((residual**2).sum(axis=0), 1e-300)
    seen = (residual[1:] * residual[:-1]).sum(axis=0) / power
    return sorted({min(GRID, key=lambda rho: abs(rho - own)) for own in seen})
