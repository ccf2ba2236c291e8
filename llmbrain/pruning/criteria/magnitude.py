"""Norms of weights."""

from __future__ import annotations

from torch import Tensor

from llmbrain.anatomy.units import NEURONS
from llmbrain.pruning.criteria.base import Evidence, register


@register("magnitude")
def magnitude(e: Evidence) -> Tensor:
    """Product of the L2 norms of a unit's weights in every matrix that holds it.

    For a gated MLP ``|gate_j| |up_j| |down_j|``: the scale of unit j's contribution, unchanged when weight
    moves from one matrix to another. For heads the norm of all of W_j (as in FLAP's code).
    """
    score = e.by_unit(e.weight.square().sum(1)).sqrt()
    if e.units is NEURONS:
        for projection in e.units.inputs(e.layer):
            score = score * projection.weight().detach().double().norm(dim=1).to(score.device)
    return score
