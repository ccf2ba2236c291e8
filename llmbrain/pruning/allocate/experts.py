"""How many routed experts each layer keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from llmbrain._validation import InputError
from llmbrain.anatomy.experts import ExpertAnatomy, Routed

ALLOCATIONS = ("uniform", "global")
NEEDED_IN_GROUP = 2  # a router among groups judges a group by its two best


def how_many(body: ExpertAnatomy, ratio: float, allocation: str | Sequence[int] | None = None) -> dict[int, int]:
    """Experts that stay in each layer: as many of every layer, or as said.

    Raises
    ------
    InputError
        If a router could not choose what a token visits, or nothing is removed.
    """
    routed = dict(body.routed)
    if allocation is None or isinstance(allocation, str):
        if allocation not in (None, *ALLOCATIONS):
            raise InputError(
                f"allocation={allocation!r}: experts are spread over layers by 'uniform' (as many of every layer), "
                "'global' (all layers ranked together), or how many each layer keeps"
            )
        return {layer: _share(layer, r, ratio) for layer, r in routed.items()}
    given = list(allocation)
    before = [routed[i].count if i in routed else 0 for i in range(len(body.layers))]
    if len(given) != len(before) or any(
        isinstance(n, bool) or not isinstance(n, Integral) or not min(1, b) <= n <= b for n, b in zip(given, before)
    ):
        raise InputError(f"allocation={given} must give each layer 1 to {before} experts (0 where it has none)")
    keep, total = sum(given), sum(before)
    if abs(1 - keep / total - ratio) > len(routed) / (2 * total):
        raise InputError(
            f"allocation={given} keeps {keep} of {total} experts, expert_ratio={ratio} asks for "
            f"{round((1 - ratio) * total)}"
        )
    return {layer: int(given[layer]) for layer in routed}


def _share(layer: int, routed: Routed, ratio: float) -> int:
    size = routed.count // routed.n_groups
    stay = routed.n_groups * (size - round(ratio * size))
    if stay < routed.top_k:
        raise InputError(
            f"expert_ratio={ratio} leaves {stay} of {routed.count} experts in layer {layer}, but its router calls "
            f"{routed.top_k} for every token"
        )
    if stay == routed.count:
        raise InputError(f"expert_ratio={ratio} removes none of the {routed.count} experts of layer {layer}")
    return stay


def least(routed: Routed) -> int:
    """Experts that a router must be left."""
    if routed.n_groups == 1:
        return routed.top_k
    each = max(NEEDED_IN_GROUP, -(-routed.top_k // routed.groups_visited))
    return routed.n_groups * each


def ranked(body: ExpertAnatomy, ratio: float, scores: Mapping[int, NDArray[np.float64]]) -> dict[int, int]:
    """Experts that stay in each layer when all are ranked together, scores standardized within a layer.

    Grouped routers lose as many of every group.
    """
    routed = dict(body.routed)
    stay = {layer: r.count for layer, r in routed.items()}
    left = round(ratio * sum(stay.values()))
    entries = []
    for layer, r in routed.items():
        of = scores[layer]
        standard = (of - of.mean()) / (of.std() or 1.0)
        step = r.n_groups  # experts that go together: the worst that is left of every group
        by_rank = np.sort(standard.reshape(step, -1), axis=1).mean(axis=0)
        most = (r.count - least(r)) // step
        entries += [(float(value), layer, step) for value in by_rank[: max(0, most)]]
    for _, layer, step in sorted(entries):
        if left >= step:
            stay[layer] -= step
            left -= step
    if all(stay[layer] == r.count for layer, r in routed.items()):
        raise InputError(f"expert_ratio={ratio} removes no expert: {sum(stay.values())} in all")
    return stay
