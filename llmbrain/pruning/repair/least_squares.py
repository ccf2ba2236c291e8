"""Refit what a cut does to a layer's output: least squares on the output projection, or its bias alone."""

from __future__ import annotations

import torch
from torch import Tensor

from llmbrain.anatomy.surgery import Refit
from llmbrain.pruning.calibrate.moments import Moments

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def least_squares(moments: Moments, weight: Tensor, kept: Tensor, *, ridge: float, intercept: bool = True) -> Refit:
    """Ridge regression of the wanted output on the signals that stay, drawn towards the old weights.

    ``min_W E|W' x_K + b - t|^2 + lambda |W' - W_K|^2`` with ``lambda = ridge * mean diagonal of cov(x)``: a layer
    without signal keeps its weights, and few tokens change them little.

    Parameters
    ----------
    moments : Moments
        Of all signals and of the wanted output t.
    weight : (columns, outputs) float64
        Old weights.
    kept : (k,) int64
        Columns that stay.
    ridge : float
        Relative to the mean variance of the signals.
    intercept : bool
        Fit b; without it t is fitted through the origin.
    """
    s, cross = _normal_equations(moments, intercept)
    old = weight[kept]
    penalty = ridge * s.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    left = s[kept][:, kept]
    left.diagonal().add_(penalty)
    right = cross[:, kept].T + penalty * old
    factor, failed = torch.linalg.cholesky_ex(left)
    new = torch.linalg.solve(left, right) if bool(failed) else torch.cholesky_solve(right, factor)
    bias = moments.target_mean - moments.mean[kept] @ new if intercept else None
    return Refit(new, bias, ridge)


def _normal_equations(moments: Moments, intercept: bool) -> tuple[Tensor, Tensor]:
    if intercept:
        return moments.covariance, moments.cross_covariance
    return (
        moments.covariance + torch.outer(moments.mean, moments.mean),
        moments.cross_covariance + torch.outer(moments.target_mean, moments.mean),
    )


def error(moments: Moments, refit: Refit, kept: Tensor, metric: Tensor | None = None) -> float:
    """Mean squared error of a repaired output on the tokens of `moments`, summed over outputs (in `metric`)."""
    new, cross = refit.weight, moments.cross_covariance[:, kept]
    across = moments.covariance[kept][:, kept] @ new
    offset = moments.mean[kept] @ new - moments.target_mean
    if refit.bias is not None:
        offset = offset + refit.bias
    if metric is None:  # only the diagonal of what a metric would weigh
        return float((new * (across - 2 * cross.T)).sum() + moments.target_variance.sum() + offset @ offset)
    return float((metric * (new.T @ across - 2 * (cross @ new))).sum() + offset @ metric @ offset)


def choose_ridge(train: Moments, held_out: Moments, weight: Tensor, kept: Tensor, *, intercept: bool = True) -> float:
    """The ridge of `RIDGES` whose fit on `train` errs least on `held_out`, from the middle on while the error falls."""
    errors: dict[int, float] = {}

    def at(i: int) -> float:
        if i not in errors:
            fit = least_squares(train, weight, kept, ridge=RIDGES[i], intercept=intercept)
            errors[i] = error(held_out, fit, kept)
        return errors[i]

    best, last = len(RIDGES) // 2, len(RIDGES) - 1
    for way in (1, -1):
        while 0 <= best + way <= last and at(best + way) < at(best):
            best += way
    return RIDGES[best]


def bias_only(moments: Moments, weight: Tensor, kept: Tensor) -> Refit:
    """Old weights, and the mean of what was cut in the bias (FLAP, arXiv 2312.11983, eq. 4)."""
    old = weight[kept]
    return Refit(old, moments.target_mean - moments.mean[kept] @ old)
