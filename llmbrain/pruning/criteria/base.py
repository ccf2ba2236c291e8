"""What a criterion is: what it needs, how it prepares, how it scores the units of a layer, and its own defaults.

W is the output projection (down projection of the MLP, output projection of the attention), W_j its column(s) for unit
j, x_j that unit's signal over calibration tokens, C the covariance of signals. To add a criterion, write a function of
`Evidence`, or a subclass of `Criterion` where more is to be said, in a file of its own, and `register` it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from llmbrain._validation import InputError, check_option
from llmbrain.anatomy.families import Anatomy, LayerAnatomy, Projection
from llmbrain.anatomy.units import Units
from llmbrain.networks import FunctionalNetworks
from llmbrain.pruning.calibrate.moments import Moments
from llmbrain.scanning.scans import Scan

NEEDS = ("activations", "gradients", "networks", "scans", "text")
"""What a criterion may need: moments of the signals, second moments of the loss gradient, functional networks (it does
without where none are given), scans of its sites (or text to record them from), calibration text."""


@dataclass
class Material:
    """What there is to prepare a criterion from, while the model is dense.

    Attributes
    ----------
    model : transformers model
    body : Anatomy
    windows : (n, window) int64 or None
        Calibration text.
    weights : (n, window) float or None
        How much each of its tokens counts.
    networks : FunctionalNetworks or None
    scans : sequence of Scan
    random_state : int
    token_balance : float, optional
        Strength of token weights by networks, 0 to 1; default by depth, see `llmbrain.pruning.criteria.networks`.
    rule : dict
        Options of the criterion's own.
    notes : list of str
        Sentences that the reader of the plan should see; a criterion adds to them.
    details : dict
        What else the plan should record, as plain JSON values; a criterion adds to it.
    """

    model: nn.Module
    body: Anatomy
    windows: Tensor | None = None
    weights: Tensor | None = None
    networks: FunctionalNetworks | None = None
    scans: Sequence[Scan] = ()
    random_state: int = 0
    token_balance: float | None = None
    rule: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evidence:
    """What a criterion scores a layer by: its units, and what calibration said about them.

    Attributes
    ----------
    layer : LayerAnatomy
    units : Units
        Which kind is scored.
    output : Projection
        What the units enter: the down projection, or the attention's output projection.
    weight : (columns, outputs) float64
        Of `output`; unit j owns `size` consecutive columns of W, rows here.
    generator : torch.Generator
    moments : Moments or None
        Of the signals (columns), with the wanted output as target; for criteria that need activations.
    metric : (outputs, outputs) float64 or None
        ``E[g g^T]`` of the output's loss gradient; for criteria that need gradients.
    """

    layer: LayerAnatomy
    units: Units
    output: Projection
    weight: Tensor
    generator: Generator
    moments: Moments | None = None
    metric: Tensor | None = None

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


class Criterion:
    """How much units matter; one object a plan. What `register` was told stands in its class attributes.

    Attributes
    ----------
    name : str
    needs : frozenset of str
        Of `NEEDS`.
    standardize : bool
        Whether scores mean something only within a layer, so that ranking over layers needs z-scores.
    sequential : bool
        Whether it is meant to be computed on the already pruned prefix.
    allocation : str
        How it spreads the budget over layers where the user does not say; see `spread` for deep models.
    blocks : str
        How it chooses whole MLPs and attentions, a key of `llmbrain.pruning.allocate.blocks.CHOOSERS`; "" where it
        scores units only.
    draws : bool
        Whether scores are drawn from the evidence's generator: layers then take their turns.
    insists : bool
        Whether what it protects stays whole however much is to go.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    standardize: ClassVar[bool] = True
    sequential: ClassVar[bool] = False
    allocation: ClassVar[str] = "uniform"
    blocks: ClassVar[str] = ""
    draws: ClassVar[bool] = False
    insists: ClassVar[bool] = False

    def sites(self, body: Anatomy) -> tuple[str, ...]:
        """Sites that scans should have beside the neurons."""
        return ()

    def weigh(self, material: Material) -> Tensor | None:
        """How much each calibration token counts, ``(n, window)``, where the user did not say; None is all alike."""
        return None

    def prepare(self, material: Material, units: Units) -> None:
        """Gather what needs the whole dense model; called once for each kind of units, neurons first."""

    def score(self, evidence: Evidence) -> Tensor:
        """Scores ``(units,)`` of one layer's units; higher ones stay."""
        raise NotImplementedError

    def choose(self, scores: NDArray[np.float64], count: int, layer: int, units: Units) -> NDArray[np.int64]:
        """Ascending indices of the `count` units that stay in a layer."""
        return best_units(scores, count)

    def protect(self, n_layers: int, notes: list[str]) -> tuple[int, ...]:
        """Layers that are not cut where the user does not say; may add a note."""
        return ()

    def spread(self, n_layers: int) -> str:
        """The allocation where the user does not say, for a model of so many layers."""
        return self.allocation

    def facts(
        self, dense: Callable[[], list[NDArray[np.float64]]], kept: Sequence[NDArray[np.int64]], protect: Sequence[int]
    ) -> dict[str, Any]:
        """What the plan should record of a choice of neurons; `dense` gives the scores of the dense model."""
        return {}


MOST_OF_FREE = 0.85  # share that layers may lose so that others, which a method protects by default, lose nothing


def ends(n_layers: int) -> tuple[int, ...]:
    """The first three and the last two of more than five layers, as arXiv 2508.05239 keeps them in Llama."""
    return (0, 1, 2, n_layers - 2, n_layers - 1) if n_layers > 5 else ()


def protection(criterion: Criterion, widths: Sequence[int], ratio: float | None, notes: list[str]) -> tuple[int, ...]:
    """What a criterion protects, unless it gives way: where the other layers would keep next to nothing."""
    said: list[str] = []
    found = criterion.protect(len(widths), said)
    free = sum(widths) - sum(widths[i] for i in found)
    if found and not criterion.insists and ratio is not None and ratio * sum(widths) > MOST_OF_FREE * free:
        notes.append(f"no layer is protected: the others would lose more than {MOST_OF_FREE:.0%}")
        return ()
    notes += said
    return found


CRITERIA: dict[str, type[Criterion]] = {}

_Registered = TypeVar("_Registered", bound=type[Criterion] | Callable[[Evidence], Tensor])


def register(
    name: str,
    *needs: str,
    standardize: bool = True,
    sequential: bool = False,
    allocation: str = "uniform",
    draws: bool = False,
) -> Callable[[_Registered], _Registered]:
    """Decorator: make a criterion that ``plan_pruning(method=name)`` knows, also from outside this package.

    Parameters
    ----------
    name : str
    *needs : str
        Of `NEEDS`.
    standardize, sequential, allocation, draws
        As in `Criterion`.

    Returns
    -------
    decorator
        Of a function of `Evidence` that gives scores, or of a subclass of `Criterion`.

    Examples
    --------
    >>> @register("norm")
    ... def norm(e: Evidence) -> Tensor:
    ...     return e.by_unit(e.weight.square().sum(1))
    """
    for need in needs:
        check_option("needs", need, NEEDS)
    said = {"name": name, "needs": frozenset(needs), "standardize": standardize, "sequential": sequential,
            "allocation": allocation, "draws": draws}  # fmt: skip

    def wrap(what: _Registered) -> _Registered:
        if isinstance(what, type):
            CRITERIA[name] = type(what.__name__, (what,), {**_origin(what), **said})
        else:
            CRITERIA[name] = type(name, (Criterion,), {"score": staticmethod(what), **_origin(what), **said})
        return what

    return wrap


def _origin(what: Any) -> dict[str, Any]:
    return {"__module__": what.__module__, "__doc__": what.__doc__}


def criterion(method: str) -> type[Criterion]:
    """The criterion of a name; an unknown one is an `InputError` that lists all."""
    return CRITERIA[check_option("method", method, sorted(CRITERIA))]


def best_units(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Ascending indices of the `count` best."""
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int64)
