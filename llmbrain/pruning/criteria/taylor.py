"""First-order importance (LLM-Pruner)."""

from __future__ import annotations

from torch import Tensor

from llmbrain._validation import InputError
from llmbrain.pruning.criteria.base import Evidence, register


@register("taylor", "taylor")
def taylor(e: Evidence) -> Tensor:
    """``sum |w dL/dw|`` over the unit's weights (LLM-Pruner, arXiv 2305.11627, eq. 5, first order by parameter)."""
    if e.taylor is None:
        raise InputError("this criterion needs calibration text")
    return e.taylor
