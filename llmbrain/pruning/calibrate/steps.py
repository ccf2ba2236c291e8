"""What is done at a projection: found by one, the rank that owns the layer, and known to all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from llmbrain.anatomy.families import LayerAnatomy, Projection
from llmbrain.anatomy.surgery import Change, Refit
from llmbrain.anatomy.units import Units
from llmbrain.distributed import Parcel, Ranks
from llmbrain.pruning.calibrate.moments import Moments


@dataclass
class Measured:
    """An output projection to be worked on, with the moments of its inputs (signals) and wanted outputs (targets)."""

    layer: LayerAnatomy
    units: Units
    output: Projection
    train: Moments
    held_out: Moments

    @property
    def all(self) -> Moments:
        """Moments of all calibration tokens."""
        return self.train + self.held_out if self.held_out.n else self.train

    @property
    def weight(self) -> Tensor:
        """``(columns, outputs)`` float64, as it is now."""
        return self.output.weight().detach().double()


@dataclass
class Found:
    """What was found at a projection.

    Attributes
    ----------
    change : Change or None
        Of its weights.
    arrays : dict of array
        What else there is to know.
    """

    change: Change | None = None
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


def _nothing(layer: LayerAnatomy, found: Found) -> None:
    pass


@dataclass
class Step:
    """What to do at each projection of a walk.

    Attributes
    ----------
    find : function of a `Measured`
        Done by the rank that owns the layer, with the moments of all ranks' tokens. Nothing but what it returns is
        known to the others, and it leaves the model as it is.
    take : function of a layer and what was found there
        Done by all ranks, in the order of layers.
    in_turn : bool
        Whether `find` must not begin before `take` of the layer before, though the walk is not sequential.
    """

    find: Callable[[Measured], Found]
    take: Callable[[LayerAnatomy, Found], None] = _nothing
    in_turn: bool = False


Look = Callable[[Measured], Change | None]
"""A plain function in place of a `Step`: every rank does the same."""


@dataclass(frozen=True)
class Propagation:
    """What each layer takes on of the error that earlier layers left.

    Attributes
    ----------
    share : float
        Of the error after the block.
    by_layer : list of float
        The same in the units of each layer's MLP output.
    """

    share: float
    by_layer: list[float]


def settle(team: Ranks, owner: int, step: Step | Look, layer: LayerAnatomy, measured: Measured) -> Change | None:
    """Do a step at one layer; of a team, by its owner for all."""
    if not isinstance(step, Step):
        return step(measured)
    found = step.find(measured) if team.size == 1 else _unpacked(
        team.found_by(owner, layer.path, lambda: _packed(step.find(measured)))
    )  # fmt: skip
    step.take(layer, found)
    return found.change


def settle_all(
    team: Ranks, step: Step, waiting: list[tuple[LayerAnatomy, Projection, Measured]]
) -> list[tuple[Projection, Change]]:
    """Do a step at as many layers as there are ranks, each by its owner, at once; the changes that come of it."""

    def find(number: int) -> Parcel:
        return _packed(step.find(waiting[number][2]))

    changes = []
    for (layer, output, _), parcel in zip(waiting, team.each(len(waiting), waiting[0][0].path, find)):
        found = _unpacked(parcel)
        step.take(layer, found)
        if found.change is not None:
            changes.append((output, found.change))
    return changes


def _packed(found: Found) -> Parcel:
    tensors = {f"array {name}": torch.from_numpy(array) for name, array in found.arrays.items()}
    change = found.change
    if change is None:
        return Parcel(tensors, None)
    tensors["kept"] = change.kept
    if change.refit is not None:
        tensors["weight"] = change.refit.weight
        if change.refit.bias is not None:
            tensors["bias"] = change.refit.bias
    return Parcel(tensors, None if change.refit is None else float(change.refit.ridge))


def _unpacked(parcel: Parcel) -> Found:
    tensors = dict(parcel.tensors)
    arrays = {name[6:]: tensors.pop(name).numpy() for name in list(tensors) if name.startswith("array ")}
    if "kept" not in tensors:
        return Found(None, arrays)
    refit = None
    if "weight" in tensors:
        refit = Refit(tensors["weight"], tensors.get("bias"), parcel.record)
    return Found(Change(tensors["kept"], refit), arrays)
