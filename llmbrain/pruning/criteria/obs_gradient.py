"""Greedy optimal brain surgeon in the metric of the loss."""

from __future__ import annotations

from torch import Tensor

from llmbrain.pruning.criteria.base import Evidence, register
from llmbrain.pruning.criteria.obs import RIDGE, removal_costs


@register("obs-gradient", "activations", "gradients", standardize=False, sequential=True)
def obs_gradient(e: Evidence) -> Tensor:
    """Greedy OBS with the output error measured by ``G = E[g g^T]``, g the loss gradient at the output.

    ``W_j^T G W_j / [C^-1]_jj``: LLM Surgeon's Kronecker-factored curvature (arXiv 2312.17244, eq. 6 and 11). Scores are
    estimates of the loss added, so layers are comparable as they are.
    """
    assert e.metric is not None
    return removal_costs(e.measured.covariance, e.weight, metric=e.metric, size=e.size, ridge=RIDGE)
