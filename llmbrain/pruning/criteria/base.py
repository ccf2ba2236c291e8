"""What a criterion is: a function of `Evidence` under a name; higher scores stay.

W is the output projection (down projection of the MLP, output projection of the attention), W_j its column(s) for unit
j, x_j that unit's signal over calibration tokens, C the covariance of signals. To add a criterion, write a function of
`Evidence` in a file of its own and register it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Generator, Tensor

from llmbrain._validation import InputError, check_option
from llmbrain.anatomy.families import LayerAnatomy, Projection
from llmbrain.pruning.calibrate.moments import Moments


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
    generator: Generator
    moments: Moments | None = None
    metric: Tensor | None = None
    taylor: Tensor | None = None
    published: Tensor | None = None

    @property
    def measured(self) -> Moments:
        """`moments`; an `InputError` where there was no calibration text."""
        if self.moments is None:
            raise InputError("this criterion needs calibration text")
        return self.moments

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
