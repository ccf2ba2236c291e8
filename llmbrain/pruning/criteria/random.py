"""Random scores: the control."""

from __future__ import annotations

import torch
from torch import Tensor

from llmbrain.pruning.criteria.base import Evidence, register


@register("random", draws=True)
def random(e: Evidence) -> Tensor:
    """Uniform random numbers: the control."""
    return torch.rand(e.output.units, generator=e.generator, dtype=torch.float64)
