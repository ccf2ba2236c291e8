"""Which units of a layer matter: one small function a criterion, higher scores stay.

W is the output projection (down projection of the MLP, output projection of the attention), W_j its column(s) for unit
j, x_j that unit's signal over calibration tokens, C the covariance of signals. To add a criterion, write a function of
`Evidence` and register it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmbrain._validation import InputError, check_option
from llmbrain.anatomy.families import LayerAnatomy, Projection
from llmbrain.pruning.obs import removal_costs
from llmbrain.pruning.statistics import Moments

RIDGE = 1e-3  # relative damping of covariances that are inverted


@dataclass
class Evidence:
    """What a criterion may look at: one layer, its units, and what calibration said about them.

    Attributes
    ----------
    layer : LayerAnatomy
    output : Projection
        The down projection, or the attention's output projection.
    weight : (columns, outputs) float64
        Of `output`; unit j owns `size` consecutive columns of W, rows here.
    moments : Moments or None
        Of the signals (columns), with the wanted output as target.
    metric : (outputs, outputs) float64 or None
        ``E[g g^T]`` of the output's loss gradient.
    taylor, published : (units,) float64 or None
        Scores that were computed for the whole model.
    generator : torch.Generator
    """

    layer: LayerAnatomy
    output: Projection
    weight: Tensor
    generator: torch.Generator
    moments: Moments | None = None
    metric: Tensor | None = None
    taylor: Tensor | None = None
    published: Tensor | None = None

    @property
    def size(self) -> int:
        """Columns a unit."""
        return self.output.size

    def by_unit(self, columns: Tensor) -> Tensor:
        """Sum of a value of each column over the columns of each unit."""
        return columns.reshape(self.output.units, -1).sum(1)


@dataclass(frozen=True)
class Criterion:
    """A registered criterion.

    Attributes
    ----------
    needs : frozenset of str
        Which optional fields of `Evidence` it reads.
    standardise : bool
        Whether scores mean something only within a layer, so that ranking over layers needs z-scores.
    sequential : bool
        Whether it is meant to be computed on the already pruned prefix.
    """

    name: str
    score: Callable[[Evidence], Tensor]
    needs: frozenset[str]
    standardise: bool = True
    sequential: bool = False


CRITERIA: dict[str, Criterion] = {}


def register(name: str, *needs: str, standardise: bool = True, sequential: bool = False) -> Callable[..., Callable]:
    """Decorator: make a function of `Evidence` a criterion that `plan_pruning(method=name)` knows."""

    def wrap(function: Callable[[Evidence], Tensor]) -> Callable[[Evidence], Tensor]:
        CRITERIA[name] = Criterion(name, function, frozenset(needs), standardise, sequential)
        return function

    return wrap


def criterion(method: str) -> Criterion:
    """The criterion of a name; an unknown one is an `InputError` that lists all."""
    return CRITERIA[check_option("method", method, sorted(CRITERIA))]


def _moments(e: Evidence) -> Moments:
    if e.moments is None:
        raise InputError("this criterion needs calibration text")
    return e.moments


@register("random")
def random(e: Evidence) -> Tensor:
    """Uniform random numbers: the control."""
    return torch.rand(e.output.units, generator=e.generator, dtype=torch.float64)


@register("magnitude")
def magnitude(e: Evidence) -> Tensor:
    """Product of the L2 norms of a unit's weights in every matrix that holds it.

    For a gated MLP ``|gate_j| |up_j| |down_j|``: the scale of unit j's contribution, unchanged when weight
    moves from one matrix to another. For heads the norm of all of W_j (as in FLAP's code).
    """
    score = e.by_unit(e.weight.square().sum(1)).sqrt()
    if e.output is e.layer.down:
        for projection in e.layer.inputs:
            score = score * projection.weight().detach().double().norm(dim=1).to(score.device)
    return score


@register("wanda-sp", "moments")
def wanda_sp(e: Evidence) -> Tensor:
    """``sum_i |W_ij| |x_j|_2`` (Wanda-sp, in FLAP, arXiv 2312.11983, eq. 3 with structured sums)."""
    return e.by_unit(e.weight.abs().sum(1) * _moments(e).mean_square.clamp_min(0).sqrt())


@register("flap", "moments")
def flap(e: Evidence) -> Tensor:
    """``var(x_j) |W_j|_2^2``: the fluctuation that a constant can not replace (FLAP, arXiv 2312.11983, eq. 5, WIFV).

    The variance is the exact one of all tokens, unlike the running one of the publication's code.
    """
    return e.by_unit(e.weight.square().sum(1) * _moments(e).variance.clamp_min(0))


@register("taylor", "taylor")
def taylor(e: Evidence) -> Tensor:
    """``sum |w dL/dw|`` over the unit's weights (LLM-Pruner, arXiv 2305.11627, eq. 5, first order by parameter)."""
    if e.taylor is None:
        raise InputError("this criterion needs calibration text")
    return e.taylor


@register("obs", "moments", sequential=True)
def obs(e: Evidence) -> Tensor:
    """Greedy structured optimal brain surgeon: ``|W_j|^2 / [C^-1]_jj``, W and C^-1 updated after each removal.

    ZipLM (arXiv 2302.04089, eq. 3-5), OSSCAR (2403.12983), SlimGPT (2412.18110). The score is what the output loses, in
    squared error, when the unit goes and all others are refitted; C is centred, since an intercept takes the mean.
    """
    return removal_costs(_moments(e).covariance, e.weight, size=e.size, ridge=RIDGE)


@register("obs-gradient", "moments", "metric", standardise=False, sequential=True)
def obs_gradient(e: Evidence) -> Tensor:
    """Greedy OBS with the output error measured by ``G = E[g g^T]``, g the loss gradient at the output.

    ``W_j^T G W_j / [C^-1]_jj``: LLM Surgeon's Kronecker-factored curvature (arXiv 2312.17244, eq. 6 and 11). Scores are
    estimates of the loss added, so layers are comparable as they are.
    """
    assert e.metric is not None
    return removal_costs(_moments(e).covariance, e.weight, metric=e.metric, size=e.size, ridge=RIDGE)


@register("networks", "moments", "metric", "networks", standardise=False, sequential=True)
def networks(e: Evidence) -> Tensor:
    """Ours: `obs_gradient`, with every network covered, and tokens that networks leave unexplained weighted more.

    Coverage enters the choice, weights the moments, the metric, the measured losses and the repair: see
    `llmbrain.pruning.network_terms`. Without networks it is `obs_gradient` with the allocation that measured best.
    """
    return obs_gradient(e)


@register("published", "published", standardise=False)
def published(e: Evidence) -> Tensor:
    """Largest |z| of a unit in any map of any group (arXiv 2508.05239); see `llmbrain.pruning.published`."""
    if e.published is None:
        raise InputError("this criterion needs scans or calibration text")
    return e.published
