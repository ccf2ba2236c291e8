"""Refit output projections to what the units that stay can still give, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain.anatomy.families import Anatomy, LayerAnatomy
from llmbrain.anatomy.surgery import Change
from llmbrain.anatomy.units import Units
from llmbrain.pruning.calibrate.moments import Moments
from llmbrain.pruning.calibrate.steps import Found, Measured, Propagation, Step
from llmbrain.pruning.calibrate.stream import walk
from llmbrain.pruning.repair.least_squares import bias_only, choose_ridge, least_squares

FALLBACK_RIDGE = 1e-2  # where there is too little text to hold some out


def repair(
    model: nn.Module,
    body: Anatomy,
    windows: Tensor,
    kept: Mapping[Units, Sequence[NDArray]],
    *,
    kind: str,
    ridge: float | None = None,
    intercept: bool = True,
    sequential: bool = True,
    weights: Tensor | None = None,
    done: Callable[[LayerAnatomy], None] | None = None,
    carry: Propagation | None = None,
) -> None:
    """Write refitted output projections into a model, with zeros where units go; shapes stay.

    Parameters
    ----------
    windows : (n, window) int64
    kept : mapping
        Units of each kind that stay, by layer.
    kind : str
        ``"bias"`` or ``"least-squares"``.
    ridge, intercept, sequential, weights
        As in `llmbrain.prune`.
    done : function, optional
        Gets each layer once it is repaired: see `llmbrain.pruning.calibrate.stream.walk`.
    carry : Propagation, optional
        How much of the error of earlier layers each takes on: see `llmbrain.pruning.repair.propagation`.
    """
    removed = any(len(k) < n for units, of in kept.items() for k, n in zip(of, units.counts(body)))

    def step(units: Units) -> Step:
        def at(measured: Measured) -> Change | None:
            stays = torch.from_numpy(kept[units][measured.layer.index])
            if len(stays) == measured.output.units and not (sequential and removed):
                return None
            return fit(measured, stays, kind, ridge, intercept)

        return Step(lambda measured: Found(at(measured)))

    steps = {units: step(units) for units in kept}
    walk(model, body, windows, steps, sequential=sequential, weights=weights, progress="repair", done=done,
         carry=carry)  # fmt: skip


def fit(
    measured: Measured,
    kept: Tensor,
    kind: str,
    ridge: float | None = None,
    intercept: bool = True,
    on: Moments | None = None,
) -> Change:
    """The refit of one output projection for the units that stay, `on` all its moments or those given.

    Where none stays nothing is fitted: what is dropped adds nothing, and what comes after it is fitted to that.
    Without `intercept` no bias is added; one that is there is fitted all the same, since the target holds it.
    """
    if not len(kept):
        return Change(kept)
    weight, output = measured.weight, measured.output
    intercept = intercept or isinstance(getattr(output.module, "bias", None), Tensor)
    columns = (output.rows(kept) - output.start).to(weight.device)
    if kind == "bias":
        return Change(kept, bias_only(on or measured.all, weight, columns))
    if ridge is None:
        held = measured.held_out.n > 0
        ridge = (
            choose_ridge(measured.train, measured.held_out, weight, columns, intercept=intercept)
            if held
            else FALLBACK_RIDGE
        )
    return Change(kept, least_squares(on or measured.all, weight, columns, ridge=ridge, intercept=intercept))
