"""Widths from measured losses: by dynamic programming, or where smooth curves rise equally."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmbrain.pruning.allocate.budget import Budget

LEVELS = tuple(i / 10 for i in range(1, 10))  # shares removed at which sensitivity is measured
POWERS = (1, 2, 3, 5, 8)  # of the share removed, in a layer's smooth loss


def from_losses(
    budget: Budget, losses: NDArray[np.float64], levels: Sequence[float] = LEVELS, steps: int = 64
) -> tuple[int, ...]:
    """Widths that minimise the sum of measured losses.

    Parameters
    ----------
    losses : array ``(n_layers, len(levels))``
        Loss added when a layer alone loses each share in `levels` of its units. Made non-decreasing, interpolated
        linearly from 0 at nothing removed.
    levels : sequence of float
        Rising, in (0, 1).
    steps : int
        Widths are searched in steps of a layer's width / steps (dynamic programming over the budget).
    """
    n = len(budget.widths)
    w = np.array(budget.widths)
    unit = max(1, int(np.ceil(max(w) / steps)))
    x = np.concatenate([[0.0], levels, [1.0]])
    tables = []
    for i in range(n):
        y = np.maximum.accumulate(np.concatenate([[0.0], losses[i]]))
        y = np.append(y, y[-1] + 4 * max(y[-1] - y[-2], 1e-12))  # an empty layer is never measured: steep
        most = 0 if budget.fixed[i] else (w[i] - budget.low[i]) // unit
        tables.append(np.interp(np.arange(most + 1) * unit / max(w[i], 1), x, y))
    target = round(float(w.sum() - budget.keep) / unit)
    target = min(target, sum(len(t) - 1 for t in tables))
    best, choices = np.full(target + 1, np.inf), []
    best[0] = 0.0
    for table in tables:
        new, pick = np.full(target + 1, np.inf), np.zeros(target + 1, dtype=int)
        for removed, loss in enumerate(table[: target + 1]):
            total = best[: target + 1 - removed] + loss
            better = total < new[removed:]
            new[removed:][better] = total[better]
            pick[removed:][better] = removed
        best = new
        choices.append(pick)
    widths, left = w.astype(float), target
    for i in reversed(range(n)):
        removed = choices[i][left]
        widths[i] -= removed * unit
        left -= removed
    return budget.fit(widths)


def from_curves(budget: Budget, losses: NDArray[np.float64], levels: Sequence[float] = LEVELS) -> tuple[int, ...]:
    """Widths that minimise the sum of smooth curves through measured losses.

    Measured losses are noisy, and `from_losses` stops at the levels where one layer happened to come out low. Here each
    layer's loss is ``sum_k c_k s^k``, k in `POWERS`, of the share s removed, with ``c >= 0`` by least squares: rising
    and convex, so that the minimum is where all layers lose equally much with one more unit (or are at a bound).

    Parameters
    ----------
    losses, levels
        As in `from_losses`.
    """
    from scipy.optimize import nnls

    w, powers, shares = np.array(budget.widths, dtype=float), np.array(POWERS), np.array(levels)
    whole = np.maximum(w, 1)  # layers that have none any more are divided by nothing
    powered = shares[:, None] ** powers
    curves = np.array([nnls(powered, np.maximum.accumulate(np.maximum(y, 0)))[0] for y in losses])
    curves += 1e-9 * max(curves.max(), 1e-9)  # strictly rising
    most = 1 - budget.low / whole
    goal = w.sum() - budget.keep

    def removed(price: float) -> NDArray[np.float64]:
        """Units that each layer loses when one more may cost so much, by bisection."""
        low, high = np.zeros(len(w)), most.copy()
        for _ in range(50):
            middle = (low + high) / 2
            cheap = (curves * powers * middle[:, None] ** (powers - 1)).sum(1) / whole < price
            low, high = np.where(cheap, middle, low), np.where(cheap, high, middle)
        return np.asarray(w * low)

    left, right = 0.0, float((curves * powers).sum(1).max())
    for _ in range(100):
        price = (left + right) / 2
        left, right = (price, right) if removed(price).sum() < goal else (left, price)
    return budget.fit(w - removed(right))
