"""Weights times activations (Wanda, structured)."""

from __future__ import annotations

from torch import Tensor

from llmbrain.pruning.criteria.base import Evidence, register


@register("wanda-sp", "activations")
def wanda_sp(e: Evidence) -> Tensor:
    """``sum_i |W_ij| |x_j|_2`` (Wanda-sp, in FLAP, arXiv 2312.11983, eq. 3 with structured sums)."""
    return e.by_unit(e.weight.abs().sum(1) * e.measured.mean_square.clamp_min(0).sqrt())
