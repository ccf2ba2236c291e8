"""Fluctuation of activations (FLAP)."""

from __future__ import annotations

from torch import Tensor

from llmbrain.pruning.criteria.base import Evidence, register


@register("flap", "activations")
def flap(e: Evidence) -> Tensor:
    """``var(x_j) |W_j|_2^2``: the fluctuation that a constant can not replace (FLAP, arXiv 2312.11983, eq. 5, WIFV).

    The variance is the exact one of all tokens, unlike the running one of the publication's code.
    """
    return e.by_unit(e.weight.square().sum(1) * e.measured.variance.clamp_min(0))
