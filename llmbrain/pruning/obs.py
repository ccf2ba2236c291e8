"""Greedy structured optimal brain surgeon, in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 256  # at most so many removals with their own update; wider layers lose several units a step


def removal_costs(
    covariance: Tensor,
    weight: Tensor,
    *,
    ridge: float,
    metric: Tensor | None = None,
    size: int = 1,
) -> Tensor:
    """What each unit costs when it is removed in greedy order, all that stay refitted.

    Parameters
    ----------
    covariance : (columns, columns) float64
    weight : (columns, outputs) float64
    ridge : float
        Added to the diagonal, relative to its mean.
    metric : (outputs, outputs) float64, optional
        Inner product of output errors; default the identity.
    size : int
        Columns a unit.

    Returns
    -------
    float64 tensor ``(units,)``
        Non-decreasing in the order of removal; the smallest is the first to go.
    """
    columns = len(weight)
    units = columns // size
    step = max(1, units // STEPS)
    damping = ridge * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    inverse = torch.linalg.inv(
        covariance + damping * torch.eye(columns, dtype=covariance.dtype, device=covariance.device)
    )
    w = weight if metric is None else weight @ _root(metric)
    alive = torch.arange(units, device=weight.device)
    costs = torch.zeros(units, dtype=torch.float64, device=weight.device)
    floor = 0.0
    while len(alive):
        cost = _unit_costs(inverse, w, size)
        gone = cost.topk(min(step, len(alive)), largest=False).indices
        # A unit can get cheaper once another has gone: what counts is the order, so costs never fall.
        values = cost[gone].clamp_min(floor * (1 + 1e-9))
        costs[alive[gone]] = values
        floor = float(values.max())
        stays = torch.ones(len(alive), dtype=torch.bool, device=weight.device)
        stays[gone] = False
        out = (~stays).repeat_interleave(size)
        keep = ~out
        # Gauss-Jordan elimination of the removed block, for the rows that stay.
        across = torch.linalg.solve(inverse[out][:, out], torch.cat([inverse[out][:, keep], w[out]], dim=1))
        n = int(keep.sum())
        side = inverse[keep][:, out]
        w = w[keep] - side @ across[:, n:]
        inverse = inverse[keep][:, keep] - side @ across[:, :n]
        alive = alive[stays]
    return costs


def _unit_costs(inverse: Tensor, w: Tensor, size: int) -> Tensor:
    """``tr(W_g^T ([C^-1]_gg)^-1 W_g)`` of each unit g."""
    if size == 1:
        return w.square().sum(1) / inverse.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
    units = len(w) // size
    index = torch.arange(units * size, device=w.device).reshape(units, size)
    blocks = inverse[index[:, :, None], index[:, None, :]]
    rows = w.reshape(units, size, -1)
    return (rows * torch.linalg.solve(blocks, rows)).sum((1, 2))


def _root(metric: Tensor) -> Tensor:
    """``L`` with ``L L^T = metric``, a little damped so that no direction of the output is free."""
    damped = metric + 1e-2 * metric.diagonal().mean() * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    return torch.linalg.cholesky(damped)
