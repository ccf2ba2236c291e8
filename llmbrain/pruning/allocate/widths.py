"""How many units each layer keeps: always the exact budget, never an empty layer, never a protected one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_range

ALLOCATIONS = ("uniform", "global", "clamped", "sensitivity", "search")
LEVELS = tuple(i / 10 for i in range(1, 10))  # shares removed at which sensitivity is measured
POWERS = (1, 2, 3, 5, 8)  # of the share removed, in a layer's smooth loss
CLAMP = (0.5, 1.5)  # a layer's share removed, relative to the ratio


@dataclass(frozen=True)
class Budget:
    """What an allocation must respect.

    Attributes
    ----------
    widths : tuple of int
        Units a layer before.
    keep : int
        Units that stay in all layers together.
    protect : tuple of int
        Layers that keep all.
    multiple_of : int
        Widths of cut layers are multiples of it.
    """

    widths: tuple[int, ...]
    keep: int
    protect: tuple[int, ...] = ()
    multiple_of: int = 1

    @classmethod
    def of(
        cls,
        widths: Sequence[int],
        ratio: float,
        protect: Sequence[int] = (),
        multiple_of: int = 1,
        *,
        name: str = "ratio",
    ) -> Budget:
        """The budget of a share `ratio` removed; `name` is what errors call it.

        Raises
        ------
        InputError
            If the ratio is outside (0, 1), or what may be cut is too little for it.
        """
        check_range(name, ratio, 0, 1, open_low=True, open_high=True)
        if multiple_of != int(multiple_of) or multiple_of < 1:
            raise InputError(f"multiple_of={multiple_of!r} must be a whole number, at least 1")
        total = sum(widths)
        budget = cls(tuple(widths), total - round(ratio * total), tuple(protect), int(multiple_of))
        low, high = budget.low.sum(), budget.high.sum()
        if not low <= budget.keep:
            raise InputError(
                f"{name}={ratio} leaves {budget.keep} of {total} units, but {low} must stay (protect={list(protect)}, "
                f"multiple_of={multiple_of}, at least one unit a layer): the largest ratio is {1 - low / total:.3f}"
            )
        return budget if budget.keep <= high else cls(budget.widths, int(high), budget.protect, budget.multiple_of)

    @property
    def low(self) -> NDArray[np.int64]:
        """Least units a layer must keep; one narrower than `multiple_of` keeps all."""
        w = np.array(self.widths)
        return np.where(self.fixed, w, np.minimum(w, self.multiple_of))

    @property
    def high(self) -> NDArray[np.int64]:
        """Most units a layer may keep; a width that is no multiple may stay whole."""
        return np.array(self.widths)

    @property
    def fixed(self) -> NDArray[np.bool_]:
        """Layers that keep all."""
        w = np.array(self.widths)
        return np.isin(np.arange(len(w)), self.protect) | (w < self.multiple_of)

    def fit(self, wanted: ArrayLike) -> tuple[int, ...]:
        """Whole widths nearest to the wanted ones that use up the budget.

        The sum is `keep` exactly; with `multiple_of` it is the largest reachable sum that does not exceed it.
        """
        wanted = np.asarray(wanted, dtype=float)
        low, high, m = self.low, self.high, self.multiple_of
        free = np.flatnonzero(~self.fixed)
        widths = high.copy()
        widths[free] = np.clip(np.floor(wanted[free] / m) * m, low[free], high[free] // m * m).astype(int)
        while True:  # one step a turn: give to the layer that lacks most, or take from the one that has most too much
            spare = self.keep - int(widths.sum())
            lack = wanted - widths
            if spare >= m and (room := free[widths[free] + m <= high[free]]).size:
                times = max(1, spare // (m * room.size) // 2)
                order = room[np.argsort(-lack[room], kind="stable")][: max(1, min(room.size, spare // (m * times)))]
                widths[order] = np.minimum(widths[order] + m * times, high[order] // m * m)
            elif spare < 0 and (room := free[widths[free] - m >= low[free]]).size:
                widths[room[np.argmin(lack[room])]] -= m
            else:
                return tuple(int(w) for w in widths)


def uniform(budget: Budget) -> tuple[int, ...]:
    """The same share in every layer that may be cut."""
    w = np.array(budget.widths, dtype=float)
    fixed = budget.fixed
    share = (budget.keep - w[fixed].sum()) / max(w[~fixed].sum(), 1)
    return budget.fit(np.where(fixed, w, w * share))


def ranked(budget: Budget, scores: Sequence[NDArray[np.float64]], *, standardise: bool, clamp: bool) -> tuple[int, ...]:
    """Rank all units of all layers together and keep the best (FLAP's global standardised scores; raw if not).

    With `clamp` each layer loses between 0.5 and 1.5 times its share (FANG's bounds).
    """
    values = [_standardised(s) if standardise else np.asarray(s, dtype=float) for s in scores]
    free = [i for i in range(len(values)) if i not in budget.protect]
    n_free = budget.keep - sum(budget.widths[i] for i in budget.protect)
    pool = np.concatenate([values[i] for i in free])
    owner = np.repeat(free, [len(values[i]) for i in free])
    best = np.argsort(-pool, kind="stable")[:n_free]
    counts = np.bincount(owner[best], minlength=len(values)).astype(float)
    counts[list(budget.protect)] = [budget.widths[i] for i in budget.protect]
    if clamp:
        w = np.array(budget.widths, dtype=float)
        ratio = 1 - n_free / sum(budget.widths[i] for i in free)
        low, high = w * (1 - min(1.0, CLAMP[1] * ratio)), w * (1 - CLAMP[0] * ratio)
        counts = _clamped(counts, low, high, free, n_free)
    return budget.fit(counts)


def _standardised(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    spread = scores.std()
    return (scores - scores.mean()) / (spread if spread > 0 else 1.0)


def _clamped(
    counts: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64], free: list[int], total: float
) -> NDArray[np.float64]:
    """Shift all free counts by one amount, within bounds, until they sum to `total` (bisection)."""
    left, right = -float(high.max()), float(high.max())
    for _ in range(60):
        shift = (left + right) / 2
        over = np.clip(counts + shift, low, high)[free].sum() > total
        left, right = (left, shift) if over else (shift, right)
    result = counts.copy()
    result[free] = np.clip(counts + left, low, high)[free]
    return result


def from_losses(budget: Budget, losses: NDArray[np.float64], steps: int = 64) -> tuple[int, ...]:
    """Widths that minimise the sum of measured losses.

    Parameters
    ----------
    losses : array ``(n_layers, len(LEVELS))``
        Loss added when a layer alone loses the share `LEVELS` of its units. Made non-decreasing, interpolated linearly
        from 0 at nothing removed.
    steps : int
        Widths are searched in steps of a layer's width / steps (dynamic programming over the budget).
    """
    n = len(budget.widths)
    w = np.array(budget.widths)
    unit = max(1, int(np.ceil(max(w) / steps)))
    x = np.concatenate([[0.0], LEVELS, [1.0]])
    tables = []
    for i in range(n):
        y = np.maximum.accumulate(np.concatenate([[0.0], losses[i]]))
        y = np.append(y, y[-1] + 4 * max(y[-1] - y[-2], 1e-12))  # an empty layer is never measured: steep
        most = 0 if budget.fixed[i] else (w[i] - budget.low[i]) // unit
        tables.append(np.interp(np.arange(most + 1) * unit / w[i], x, y))
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


def from_curves(budget: Budget, losses: NDArray[np.float64]) -> tuple[int, ...]:
    """Widths that minimise the sum of smooth curves through measured losses.

    Measured losses are noisy, and `from_losses` stops at the levels where one layer happened to come out low. Here each
    layer's loss is ``sum_k c_k s^k``, k in `POWERS`, of the share s removed, with ``c >= 0`` by least squares: rising
    and convex, so that the minimum is where all layers lose equally much with one more unit (or are at a bound).

    Parameters
    ----------
    losses : array ``(n_layers, len(LEVELS))``
        As in `from_losses`.
    """
    from scipy.optimize import nnls

    w, powers, shares = np.array(budget.widths, dtype=float), np.array(POWERS), np.array(LEVELS)
    powered = shares[:, None] ** powers
    curves = np.array([nnls(powered, np.maximum.accumulate(np.maximum(y, 0)))[0] for y in losses])
    curves += 1e-9 * max(curves.max(), 1e-9)  # strictly rising
    most = 1 - budget.low / w
    goal = w.sum() - budget.keep

    def removed(price: float) -> NDArray[np.float64]:
        """Units that each layer loses when one more may cost so much, by bisection."""
        low, high = np.zeros(len(w)), most.copy()
        for _ in range(50):
            middle = (low + high) / 2
            cheap = (curves * powers * middle[:, None] ** (powers - 1)).sum(1) / w < price
            low, high = np.where(cheap, middle, low), np.where(cheap, high, middle)
        return np.asarray(w * low)

    left, right = 0.0, float((curves * powers).sum(1).max())
    for _ in range(100):
        price = (left + right) / 2
        left, right = (price, right) if removed(price).sum() < goal else (left, price)
    return budget.fit(w - removed(right))
