"""Greedy structured optimal brain surgeon, in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from llmbrain.pruning.criteria.base import Evidence, register

RIDGE = 1e-3  # relative damping of covariances that are inverted
STEPS = 256  # at most so many removals with their own update; wider layers lose several units a step
BLOCK = 64  # columns whose update of the inverse waits, so that it is one matrix product


@register("obs", "activations", sequential=True)
def obs(e: Evidence) -> Tensor:
    """Greedy structured optimal brain surgeon: ``|W_j|^2 / [C^-1]_jj``, W and C^-1 updated after each removal.

    ZipLM (arXiv 2302.04089, eq. 3-5), OSSCAR (2403.12983), SlimGPT (2412.18110). The score is what the output loses, in
    squared error, when the unit goes and all others are refitted; C is centred, since an intercept takes the mean.
    """
    return removal_costs(e.measured.covariance, e.weight, size=e.size, ridge=RIDGE)


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
    columns, device = len(weight), weight.device
    units = columns // size
    step = max(1, units // STEPS)
    damping = ridge * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    damped = covariance + damping * torch.eye(columns, dtype=covariance.dtype, device=device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    w = weight.clone() if metric is None else weight @ _root(metric)
    index = torch.arange(columns, device=device).reshape(units, size)
    blocks = inverse[index[:, :, None], index[:, None, :]]  # the units' own, kept up to date
    alive = torch.arange(units, device=device)  # units that `inverse` still holds
    here = torch.ones(units, dtype=torch.bool, device=device)  # which of them have not gone since
    waiting: list[Tensor] = []  # factors u of updates -u u^T that `inverse` lacks
    costs = torch.zeros(units, dtype=torch.float64, device=device)
    floor, left = 0.0, units
    while left:
        cost = _unit_costs(blocks, w, size).masked_fill(~here, torch.inf)
        gone = cost.topk(min(step, left), largest=False).indices
        # A unit can get cheaper once another has gone: what counts is the order, so costs never fall.
        values = cost[gone].clamp_min(floor * (1 + 1e-9))
        costs[alive[gone]] = values
        floor = float(values.max())
        left -= len(gone)
        # Elimination of the removed columns: inverse - u u^T, w - u v^T.
        out = (gone[:, None] * size + torch.arange(size, device=device)).flatten()
        across = inverse[:, out]
        if waiting:
            past = torch.cat(waiting, 1)
            across = across - past @ past[out].T
        factor = torch.linalg.cholesky(across[out])
        u = torch.linalg.solve_triangular(factor, across.T, upper=False).T
        w -= u @ torch.linalg.solve_triangular(factor, w[out], upper=False)
        per_unit = u.reshape(-1, size, u.shape[1])
        blocks -= per_unit @ per_unit.transpose(1, 2)
        here[gone] = False
        waiting.append(u)
        if sum(v.shape[1] for v in waiting) >= BLOCK:
            past = torch.cat(waiting, 1)
            keep = here.repeat_interleave(size)
            inverse = inverse[keep][:, keep].addmm_(past[keep], past[keep].T, alpha=-1)
            w, blocks, alive = w[keep], blocks[here], alive[here]
            here, waiting = here[here], []
    return costs


def _unit_costs(blocks: Tensor, w: Tensor, size: int) -> Tensor:
    """``tr(W_g^T ([C^-1]_gg)^-1 W_g)`` of each unit g, from the diagonal blocks of the inverse."""
    if size == 1:
        return w.square().sum(1) / blocks.flatten().clamp_min(torch.finfo(torch.float64).tiny)
    rows = w.reshape(len(blocks), size, -1)
    return (rows * torch.linalg.solve_ex(blocks, rows)[0]).sum((1, 2))


def _root(metric: Tensor) -> Tensor:
    """``L`` with ``L L^T = metric``, a little damped so that no direction of the output is free."""
    damped = metric + 1e-2 * metric.diagonal().mean() * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    return torch.linalg.cholesky(damped)
