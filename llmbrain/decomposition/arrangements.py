"""Which runs may be exchanged: sign flips and permutations that respect exchangeability blocks.

An arrangement is an order of the runs and a sign for each. Where all that differ can be listed, they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product
from math import comb, factorial, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmbrain._validation import InputError

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Arrangements:
    """Orders and signs, without the observed ones where all are listed.

    Attributes
    ----------
    orders : int array ``(n_arrangements, n_runs)``
    signs : float array, same shape
    exhaustive : bool
    """

    orders: Index
    signs: NDArray[np.float64]
    exhaustive: bool

    def __len__(self) -> int:
        return len(self.orders)


def labels_of(name: str, labels: Sequence[Any] | None, n_runs: int) -> list[Any] | None:
    """One label a run, or an error that names the parameter."""
    if labels is None:
        return None
    found = list(labels)
    if len(found) != n_runs:
        raise InputError(f"{name} has {len(found)} labels for {n_runs} runs: one each is needed")
    return found


def members(labels: Sequence[Any]) -> dict[Any, Index]:
    """Runs of each label, in order of first appearance."""
    order = dict.fromkeys(labels)
    return {label: np.array([i for i, other in enumerate(labels) if other == label]) for label in order}


def sign_flips(n: int, blocks: Sequence[Any] | None, limit: int, rng: np.random.Generator) -> Arrangements:
    """Flips of every run, or of every block as a whole."""
    units = np.arange(n) if blocks is None else np.unique(np.array(_numbered(blocks)), return_inverse=True)[1]
    n_units = int(units.max()) + 1
    if 2**n_units - 1 <= limit:
        flips = np.array(list(product([1.0, -1.0], repeat=n_units)))[1:]
        exhaustive = True
    else:
        flips, exhaustive = rng.choice([-1.0, 1.0], size=(limit, n_units)), False
    signs = flips[:, units]
    return Arrangements(np.tile(np.arange(n), (len(signs), 1)), signs, exhaustive)


def _numbered(labels: Sequence[Any]) -> list[int]:
    known = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return [known[label] for label in labels]


def reorderings(
    effect: NDArray[np.float64], blocks: Sequence[Any] | None, limit: int, rng: np.random.Generator, *, labels: bool
) -> Arrangements:
    """Orders in which `effect` ``(n_runs, k)`` changes: within blocks where it varies in one, else of whole blocks.

    `labels` says that runs with the same effect are interchangeable (two groups and nothing else), so that orders that
    only swap those count once.
    """
    n = len(effect)
    if blocks is None:
        strata = [[np.array([i]) for i in range(n)]]
    else:
        runs_of = list(members(blocks).values())
        if any(len(np.unique(effect[runs], axis=0)) > 1 for runs in runs_of):
            strata = [[np.array([i]) for i in runs] for runs in runs_of]
        else:
            sizes = dict.fromkeys(len(runs) for runs in runs_of)
            strata = [[runs for runs in runs_of if len(runs) == size] for size in sizes]
    kinds = [np.unique([effect[unit[0]] for unit in units], axis=0, return_inverse=True)[1].ravel() for units in strata]
    two = labels and all(kind.max(initial=0) <= 1 for kind in kinds)
    if two:
        possible = prod(comb(len(kind), int(kind.sum())) for kind in kinds)
    else:
        possible = prod(factorial(len(kind)) for kind in kinds)
    if possible < 2:
        raise InputError("blocks leave one arrangement only: no runs (or blocks of one size) can be exchanged")
    if possible - 1 <= limit:
        each = [list(_memberships(kind)) if two else list(permutations(range(len(kind)))) for kind in kinds]
        orders = [_order(n, strata, chosen) for chosen in product(*each)]
        orders = [order for order in orders if not np.array_equal(effect[order], effect)] if two else orders[1:]
        return Arrangements(np.array(orders), np.ones((len(orders), n)), True)
    if len(strata) == 1 and len(kinds[0]) == n:
        return Arrangements(rng.permuted(np.tile(np.arange(n), (limit, 1)), axis=1), np.ones((limit, n)), False)
    drawn = np.array([_order(n, strata, [rng.permutation(len(kind)).tolist() for kind in kinds]) for _ in range(limit)])
    return Arrangements(drawn, np.ones((limit, n)), False)


def _memberships(kind: Index) -> Iterator[list[int]]:
    """Every way to deal two kinds of units to the places, as an order of the units."""
    ones, zeros = np.flatnonzero(kind == 1), np.flatnonzero(kind == 0)
    for chosen in combinations(range(len(kind)), len(ones)):
        order = np.empty(len(kind), dtype=np.int64)
        order[list(chosen)] = ones
        order[np.setdiff1d(np.arange(len(kind)), chosen)] = zeros
        yield order.tolist()


def _order(n: int, strata: list[list[Index]], chosen: Sequence[Sequence[int]]) -> Index:
    order = np.arange(n)
    for units, places in zip(strata, chosen):
        for unit, place in zip(units, places):
            order[unit] = units[place]
    return order
