"""Greedy structured optimal brain surgeon, in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from llmbrain.pruning.criteria.base import Evidence, register

RIDGE = 1e-3  # relative damping of covariances that are inverted
STEPS = 256  # at most so many removals with their own update; wider layers lose several units a step
BLOCK = 64  # columns whose updates of the inverse and of W wait, so that each is one matrix product
SMALL = 4096  # columns up to which a GPU leaves the work to the CPU


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
    home = device
    if device.type != "cpu" and columns <= SMALL:  # hundreds of steps of small kernels: a core of the CPU is as fast
        covariance, weight, device = covariance.cpu(), weight.cpu(), torch.device("cpu")
        metric = None if metric is None else metric.cpu()
    units = columns // size
    step = max(1, units // STEPS)
    damping = ridge * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    inverse = torch.cholesky_inverse(_factor(covariance, damping))
    w = weight.clone() if metric is None else weight @ _root(metric)
    norms = w.square().sum(1)  # of the rows, kept up to date
    index = torch.arange(columns, device=device).reshape(units, size)
    blocks = inverse[index[:, :, None], index[:, None, :]]  # the units' own, kept up to date
    alive = torch.arange(units, device=device)  # units that `inverse` and `w` still hold
    here = torch.ones(units, dtype=torch.bool, device=device)  # which of them have not gone since
    waiting: list[tuple[Tensor, Tensor]] = []  # factors: `inverse` lacks -u u^T, `w` lacks -u v
    costs = torch.zeros(units, dtype=torch.float64, device=device)
    floor, left = torch.zeros((), dtype=torch.float64, device=device), units
    while left:
        cost = _unit_costs(blocks, norms if size == 1 else _current(w, waiting), size).masked_fill(~here, torch.inf)
        gone = cost.topk(min(step, left), largest=False).indices
        # A unit can get cheaper once another has gone: what counts is the order, so costs never fall.
        values = torch.maximum(cost[gone], floor * (1 + 1e-9))
        costs[alive[gone]] = values
        floor = values.max()
        left -= len(gone)
        # Elimination of the removed columns: inverse - u u^T, w - u v.
        out = (gone[:, None] * size + torch.arange(size, device=device)).flatten()
        across, rows = inverse[out].T, w[out]
        if waiting:
            u_past, v_past = torch.cat([u for u, _ in waiting], 1), torch.cat([v for _, v in waiting], 0)
            across = across - u_past @ u_past[out].T
            rows = rows - u_past[out] @ v_past
        factor = torch.linalg.cholesky_ex(across[out])[0]
        u = torch.linalg.solve_triangular(factor, across.T, upper=False).T
        v = torch.linalg.solve_triangular(factor, rows, upper=False)
        if size == 1:  # |w - u v|^2
            along = w @ v.T
            if waiting:
                along = along - u_past @ (v_past @ v.T)
            norms = norms + ((u @ (v @ v.T) - 2 * along) * u).sum(1)
        per_unit = u.reshape(-1, size, u.shape[1])
        blocks -= per_unit @ per_unit.transpose(1, 2)
        here[gone] = False
        waiting.append((u, v))
        if sum(len(rows) for _, rows in waiting) >= BLOCK:
            keep = here.repeat_interleave(size).nonzero()[:, 0]
            u_past, v_past = torch.cat([u for u, _ in waiting], 1)[keep], torch.cat([v for _, v in waiting], 0)
            inverse = inverse[keep][:, keep].addmm_(u_past, u_past.T, alpha=-1)
            w, blocks, alive = w[keep].addmm_(u_past, v_past, alpha=-1), blocks[here], alive[here]
            here, waiting, norms = here[here], [], w.square().sum(1)
    return costs.to(home)


def _current(w: Tensor, waiting: list[tuple[Tensor, Tensor]]) -> Tensor:
    """`w` with the updates that wait."""
    return w - sum((u @ v for u, v in waiting), torch.zeros_like(w)) if waiting else w


def _unit_costs(blocks: Tensor, w: Tensor, size: int) -> Tensor:
    """``tr(W_g^T ([C^-1]_gg)^-1 W_g)`` of each unit g, from the diagonal blocks of the inverse.

    `w` is W; of units of one column the squared norms of its rows are enough.
    """
    if size == 1:
        return w / blocks.flatten().clamp_min(torch.finfo(torch.float64).tiny)
    rows = w.reshape(len(blocks), size, -1)
    return (rows * torch.linalg.solve_ex(blocks, rows)[0]).sum((1, 2))


def _root(metric: Tensor) -> Tensor:
    """``L`` with ``L L^T = metric``, a little damped so that no direction of the output is free."""
    return _factor(metric, 1e-2 * metric.diagonal().mean())


def _factor(matrix: Tensor, damping: Tensor) -> Tensor:
    """``L`` with ``L L^T = matrix + damping``, damped more where there is nothing but rounding (a token alone)."""
    one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(matrix + damping * one)
    least = matrix.abs().max() * torch.finfo(matrix.dtype).eps
    for _ in range(32):
        if not bool(failed):
            return factor
        damping = torch.maximum(10 * damping, least)
        factor, failed = torch.linalg.cholesky_ex(matrix + damping * one)
    return torch.linalg.cholesky(matrix + damping * one)  # says what is wrong with it
