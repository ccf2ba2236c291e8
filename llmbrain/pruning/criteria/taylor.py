"""First-order importance (LLM-Pruner)."""

from __future__ import annotations

from torch import Tensor

from llmbrain.anatomy.units import Units
from llmbrain.pruning.calibrate.gradients import gradient_pass
from llmbrain.pruning.criteria.base import Criterion, Evidence, Material, register


@register("taylor", "text")
class Taylor(Criterion):
    """``sum |w dL/dw|`` over the unit's weights (LLM-Pruner, arXiv 2305.11627, eq. 5, first order by parameter)."""

    def __init__(self) -> None:
        self._importance: dict[Units, list[Tensor]] = {}

    def prepare(self, material: Material, units: Units) -> None:
        """One backward pass over the text."""
        assert material.windows is not None
        found = gradient_pass(
            material.model, material.body, material.windows, units, metric=False, taylor=True, weights=material.weights
        )
        self._importance[units] = found["taylor"]

    def score(self, evidence: Evidence) -> Tensor:
        """As prepared."""
        return self._importance[evidence.units][evidence.layer.index]
