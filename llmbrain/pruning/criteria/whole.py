"""Criteria of publications that remove whole parts of a model: ShortGPT and 2SSP."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from llmbrain.pruning.criteria.base import Criterion, Evidence, register


@register("shortgpt", "text")
class ShortGPT(Criterion):
    """Whole layers of least block influence, ``1 - E cos(in, out)`` (ShortGPT, arXiv 2403.03853).

    As many layers as hold about the parameters that the ratio takes from the MLPs. Neurons of other layers all stay.
    """

    blocks: ClassVar[str] = "influence"

    def score(self, evidence: Evidence) -> Tensor:
        """All alike: a layer goes whole or stays whole."""
        return torch.zeros(evidence.output.units, dtype=torch.float64)


@register("2ssp", "activations")
class TwoStages(Criterion):
    """Neurons by the L2 norm of their activity, then whole attentions by perplexity (2SSP, arXiv 2501.17771).

    The norm is that of all calibration tokens together, where the publication averages norms of single texts.
    """

    blocks: ClassVar[str] = "two-stages"

    def score(self, evidence: Evidence) -> Tensor:
        """``sqrt(E x_j^2)``."""
        return evidence.by_unit(evidence.measured.mean_square.clamp_min(0)).sqrt()
