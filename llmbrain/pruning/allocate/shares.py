"""Widths by shares and ranks: the same share everywhere, or the best units of all layers together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmbrain.anatomy.space import NeuronSpace
from llmbrain.pruning.allocate.budget import Budget

CUTOFFS = (2.0, 2.5, 3.0, 3.6, 4.5)  # in z: where networks live is not to hang on one of them
CLAMP = (0.5, 1.5)  # a layer's share removed, relative to the ratio


def uniform(budget: Budget) -> tuple[int, ...]:
    """The same share in every layer that may be cut."""
    w = np.array(budget.widths, dtype=float)
    fixed = budget.fixed
    share = (budget.keep - w[fixed].sum()) / max(w[~fixed].sum(), 1)
    return budget.fit(np.where(fixed, w, w * share))


def ranked(budget: Budget, scores: Sequence[NDArray[np.float64]], *, standardize: bool, clamp: bool) -> tuple[int, ...]:
    """Rank all units of all layers together and keep the best (FLAP's global standardized scores; raw if not).

    With `clamp` each layer loses between 0.5 and 1.5 times its share (FANG's bounds).
    """
    values = [
        _standardized(s[:w]) if standardize else np.asarray(s[:w], dtype=float) for s, w in zip(scores, budget.widths)
    ]
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


def by_density(budget: Budget, maps: NDArray[np.floating], space: NeuronSpace) -> tuple[int, ...]:
    """Layers keep more where more of their neurons are in networks.

    A layer's density is the share of its neurons that are in any network, relative to the share in the whole model,
    mean over the cut-offs `CUTOFFS`. It keeps the budget's share times its density, shifted within the bounds of
    ``"clamped"`` until the budget is met.

    Parameters
    ----------
    budget : Budget
    maps : array ``(n_networks, n_neurons)``
        z over neurons.
    space : NeuronSpace
        Of the neurons of the model, in the order of the budget's layers.
    """
    largest = np.abs(maps).max(axis=0)
    shares = [[(largest[space.layer_slice(i)] > z).mean() for i in range(len(budget.widths))]
              for z in CUTOFFS if (largest > z).any()]  # fmt: skip
    w = np.array(budget.widths, dtype=float)
    relative = [np.array(s) / max(float((np.array(s) * w).sum() / w.sum()), 1e-12) for s in shares]
    density = np.mean(relative, axis=0) if relative else np.ones(len(w))
    free = [i for i in range(len(w)) if not budget.fixed[i]]
    total = budget.keep - w[budget.fixed].sum()
    ratio = 1 - total / max(w[free].sum(), 1)
    low, high = w * (1 - min(1.0, CLAMP[1] * ratio)), w * (1 - CLAMP[0] * ratio)
    wanted = np.where(budget.fixed, w, w * (1 - ratio) * density)
    return budget.fit(_clamped(wanted, low, high, free, total))


def _standardized(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    if not len(scores):
        return scores
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
