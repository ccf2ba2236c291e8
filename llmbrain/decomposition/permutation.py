"""Stage 3 of dual regression: permutation tests over runs, with family-wise error from the maximum statistic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, product
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmbrain._validation import InputError, check_option, check_range

Array = NDArray[np.float64]

# Two arrangements that are equal on paper (a flip of all signs) may differ in the last digits.
_TIE = 1e-9
# Numbers in one block of permuted statistics; bounds memory.
_BLOCK = 2**23


@dataclass(frozen=True)
class PermutationTest:
    """What `permutation_test` returns.

    Attributes
    ----------
    t : array ``(n_networks, n_neurons)``
        Student's t of the data as they are.
    p : array, same shape
        Uncorrected, ``(b + 1) / (n_permutations + 1)`` with b the number of arrangements at least as extreme.
    p_fwe : array, same shape
        Corrected for all neurons of the network (or for all networks too) by the largest statistic of each arrangement.
    null : array ``(n_permutations, n_networks)``
        The largest statistics.
    n_permutations : int
        Arrangements besides the observed one.
    exhaustive : bool
        True when every possible arrangement was used: the p values are exact, and small groups cannot do better than
        ``1 / (n_permutations + 1)``.
    """

    t: Array
    p: Array
    p_fwe: Array
    null: Array
    n_permutations: int
    exhaustive: bool


def permutation_test(
    maps: Any,
    *,
    groups: Sequence[Any] | None = None,
    pairs: Sequence[Any] | None = None,
    n_permutations: int = 5000,
    two_sided: bool = True,
    family: str = "network",
    random_state: int | None = 0,
) -> PermutationTest:
    """Test run maps against zero, or between two conditions or groups of runs.

    Parameters
    ----------
    maps : DualRegression or array ``(n_runs, n_networks, n_neurons)``
        Stage 2 maps (not z: amplitude counts), one set a run.
    groups : sequence of length n_runs, optional
        Condition or group of each run, two different labels. t is positive where the label that appears first is
        larger. Labels are permuted; without `groups` the mean is tested against zero by sign flips.
    pairs : sequence of length n_runs, optional
        With `groups`: which runs belong together (the same text under two conditions). Differences within a pair are
        tested by sign flips.
    n_permutations : int
        Arrangements to draw; when fewer are possible, all are used.
    two_sided : bool
        Whether large negative t counts too.
    family : {"network", "all"}
        Correct for the neurons of one network (as FSL's dual regression does), or for all networks together.
    random_state : int or None

    Returns
    -------
    PermutationTest

    Raises
    ------
    InputError
        If labels do not fit the runs, groups are not two, or fewer than two runs (pairs) are left.

    Notes
    -----
    Neurons of a layer have no neighbours, so that there is no cluster statistic and no TFCE. The +1 is that of Phipson
    & Smyth 2010 (Stat Appl Genet Mol Biol 9:39); the maximum statistic that of Nichols & Holmes 2002 (HBM 15:1).
    """
    check_option("family", family, ("network", "all"))
    check_range("n_permutations", n_permutations, 1)
    data = np.asarray(getattr(maps, "maps", maps))
    if data.ndim != 3:
        raise InputError(f"maps has shape {data.shape}: expected (n_runs, n_networks, n_neurons)")
    first = None if groups is None else _first_group(groups, len(data))
    if pairs is not None:
        data, first = _differences(data, first, pairs), None
    least = 2 if first is None else 3
    if len(data) < least:
        raise InputError(f"this permutation test needs at least {least} runs (or pairs of runs), got {len(data)}")
    arrangements, exhaustive = _arrangements(len(data), first, n_permutations, np.random.default_rng(random_state))
    statistic = _one_sample if first is None else _two_sample
    observed = np.ones(len(data)) if first is None else first.astype(np.float64)

    shape = data.shape[1:]
    t, p = np.empty(shape), np.empty(shape)
    null = np.empty((len(arrangements), shape[0]))
    for k in range(shape[0]):
        y = data[:, k].astype(np.float64)
        t[k] = statistic(observed[None], y)[0]
        p[k], null[:, k] = _against_null(t[k], y, arrangements, statistic, two_sided)
    reference = null if family == "network" else np.broadcast_to(null.max(axis=1, keepdims=True), null.shape)
    extreme = np.abs(t) if two_sided else t
    p_fwe = np.array([_share_at_least(e, column) for e, column in zip(extreme, reference.T)])
    return PermutationTest(t, p, p_fwe, null, len(arrangements), exhaustive)


def _first_group(groups: Sequence[Any], n_runs: int) -> NDArray[np.bool_]:
    labels = list(groups)
    distinct = list(dict.fromkeys(labels))
    if len(labels) != n_runs:
        raise InputError(f"groups has {len(labels)} labels for {n_runs} runs: one each is needed")
    if len(distinct) != 2:
        raise InputError(f"groups holds {len(distinct)} different labels {distinct!r}: exactly 2 are needed")
    return np.array([label == distinct[0] for label in labels])


def _differences(data: NDArray[Any], first: NDArray[np.bool_] | None, pairs: Sequence[Any]) -> NDArray[Any]:
    if first is None:
        raise InputError("pairs needs groups as well: which run of a pair is which condition")
    labels = list(pairs)
    if len(labels) != len(data):
        raise InputError(f"pairs has {len(labels)} labels for {len(data)} runs: one each is needed")
    members = {label: [i for i, other in enumerate(labels) if other == label] for label in dict.fromkeys(labels)}
    for label, runs in members.items():
        if len(runs) != 2 or first[runs].sum() != 1:
            raise InputError(f"pairs: {label!r} must name two runs, one of each group; it names runs {runs}")
    return np.array(
        [np.subtract(*(data[i] for i in sorted(runs, key=lambda i: not first[i]))) for runs in members.values()]
    )


def _arrangements(
    n: int, first: NDArray[np.bool_] | None, n_permutations: int, rng: np.random.Generator
) -> tuple[Array, bool]:
    """Rows of signs, or of zero-one membership, without the observed arrangement where all can be listed."""
    observed = np.ones(n) if first is None else first.astype(np.float64)
    possible = 2**n if first is None else comb(n, int(first.sum()))
    if possible - 1 <= n_permutations:
        every = _signs(n) if first is None else _memberships(n, int(first.sum()))
        rows = np.array([row for row in every if not np.array_equal(row, observed)])
        return rows, True
    if first is None:
        return rng.choice([-1.0, 1.0], size=(n_permutations, n)), False
    return rng.permuted(np.tile(observed, (n_permutations, 1)), axis=1), False


def _signs(n: int) -> Iterator[Array]:
    return (np.array(signs) for signs in product([1.0, -1.0], repeat=n))


def _memberships(n: int, size: int) -> Iterator[Array]:
    for chosen in combinations(range(n), size):
        row = np.zeros(n)
        row[list(chosen)] = 1
        yield row


def _one_sample(signs: Array, y: Array) -> Array:
    """t of the mean, for each row of signs; ``(rows, n_neurons)``."""
    n = len(y)
    total = signs @ y
    variance = np.maximum((y**2).sum(axis=0) - total**2 / n, 0) / (n - 1)
    return _ratio(total / n, np.sqrt(variance / n))


def _two_sample(member: Array, y: Array) -> Array:
    """t of the difference of means with pooled variance, for each row of memberships."""
    y = y - y.mean(axis=0)  # the same t, with less cancellation
    n, size = len(y), member.sum(axis=1, keepdims=True)
    inside = member @ y
    outside = -inside  # sums to zero
    within = (y**2).sum(axis=0) - inside**2 / size - outside**2 / (n - size)
    variance = np.maximum(within, 0) / (n - 2)
    return _ratio(inside / size - outside / (n - size), np.sqrt(variance * (1 / size + 1 / (n - size))))


def _ratio(mean: Array, error: Array) -> Array:
    """mean / error; 0 where a neuron is zero in all runs; error is floored where all runs agree to the last digit."""
    floor = np.abs(mean) * 1e-12
    return np.divide(mean, np.maximum(error, floor), out=np.zeros_like(mean), where=mean != 0)


def _against_null(
    t: Array, y: Array, arrangements: Array, statistic: Callable[[Array, Array], Array], two_sided: bool
) -> tuple[Array, Array]:
    extreme = np.abs(t) if two_sided else t
    threshold = extreme - _TIE * np.abs(extreme)
    count, largest = np.zeros(len(t)), []
    rows = iter(arrangements)
    while block := list(islice(rows, max(1, _BLOCK // y.shape[1]))):
        permuted = statistic(np.array(block), y)
        permuted = np.abs(permuted) if two_sided else permuted
        count += (permuted >= threshold).sum(axis=0)
        largest.append(permuted.max(axis=1))
    return (count + 1) / (len(arrangements) + 1), np.concatenate(largest)


def _share_at_least(values: Array, null: Array) -> Array:
    ordered = np.sort(null)
    above = len(ordered) - np.searchsorted(ordered, values - _TIE * np.abs(values), side="left")
    return (above + 1) / (len(ordered) + 1)
