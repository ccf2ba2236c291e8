"""Cut neurons out of experts: repair what stays, try that cutting equals silencing, cut, record."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmbrain._validation import InputError
from llmbrain._version import __version__
from llmbrain.anatomy.expert_parts import check_neurons, cut_neurons, parts_of, split
from llmbrain.anatomy.experts import ExpertAnatomy, ExpertLayer, expert_anatomy
from llmbrain.anatomy.offload import check_in_memory
from llmbrain.anatomy.surgery import Change
from llmbrain.checkpoints.expert_shapes import record_expert_shapes
from llmbrain.checkpoints.shapes import RECORD
from llmbrain.hooks.change import refuse_changed
from llmbrain.hooks.experts import changing_experts
from llmbrain.hooks.text import digest
from llmbrain.intervention.experts import change_mixture
from llmbrain.pruning.calibrate.mixture import MeasuredPart, walk_mixture
from llmbrain.pruning.expert_neurons import refit
from llmbrain.pruning.experts import answer, weights_digest
from llmbrain.pruning.plan import PruningPlan
from llmbrain.pruning.repair.undo import down_projections, unchanged
from llmbrain.pruning.verify import check_difference


def prune_expert_neurons(
    model: Any,
    plan: PruningPlan,
    *,
    windows: Tensor | None = None,
    weights: Tensor | None = None,
    compensate: str | None = None,
    ridge: float | None = None,
    sequential: bool = True,
    inplace: bool = False,
    verify: bool = True,
) -> Any:
    """Cut the neurons of experts that a plan removes; parameters as in `llmbrain.prune`.

    Without compensation the result equals the model with those neurons set to zero. ``"least-squares"`` refits the down
    projection of every expert to its own output on the tokens that call it, weighted with the square of their gate;
    ``"bias"`` needs experts whose output has a bias.
    """
    refuse_changed(model, "prune")
    check_in_memory(model, "prune")
    body = check_model(plan, model)
    check_neurons(body)
    for layer, kept in zip(body.layers, plan.kept):
        split(layer, kept)
    _check_repair(body, compensate)
    if verify:
        _check_cut(model, body, plan)
    small = model if inplace else copy.deepcopy(model)
    body = expert_anatomy(small)
    if windows is not None:

        def step(layer: ExpertLayer, found: list[MeasuredPart]) -> list[Change | None]:
            stays = split(layer, plan.kept[layer.index])
            return [refit(m, torch.from_numpy(k), str(compensate), ridge) for m, k in zip(found, stays)]

        with unchanged(down_projections(body), always=False) if inplace else nullcontext():
            walk_mixture(small, body, windows, step, sequential=sequential, weights=weights, progress="repair")
    try:
        for layer, kept in zip(body.layers, plan.kept):
            if len(kept) < layer.width:
                cut_neurons(layer, kept)
        record_expert_shapes(small)
    except BaseException as error:
        if inplace:
            error.add_note("the model was being cut in place when this happened: part of it is cut, load it again")
        raise
    written = plan.to_dict()
    record = {
        "widths_before": list(plan.widths_before), "experts_before": written["experts_before"],
        "kept": written.pop("kept"), "plan": written, "compensate": compensate,
        "calibration": None if windows is None else {"hash": digest(windows), "shape": list(windows.shape)},
        "versions": {"llmbrain": __version__, "torch": version("torch")},
    }  # fmt: skip
    setattr(small, RECORD, [*getattr(small, RECORD, []), record])
    return small


def check_model(plan: PruningPlan, model: Any) -> ExpertAnatomy:
    """The anatomy of a mixture of experts that a plan was made for; another model is an `InputError`."""
    body = expert_anatomy(model)
    found = tuple(layer.expert_widths for layer in body.layers)
    if found != plan.experts_before:
        raise InputError(
            f"plan was made for experts of {_widths(plan.experts_before or ())} neurons, this model has "
            f"{_widths(found)}"
        )
    own = weights_digest(body)
    if own != plan.digest:
        raise InputError(f"plan was made for weights {plan.digest}, this model has {own}: make a new plan")
    return body


def _widths(experts: tuple[tuple[int, ...], ...]) -> str:
    """``8 x 128, 8 x 128``: layer by layer."""
    layers = []
    for widths in experts:
        sizes = dict.fromkeys(widths)
        layers.append(" + ".join(f"{widths.count(size)} x {size}" for size in sizes))
    return ", ".join(layers)


def _check_repair(body: ExpertAnatomy, compensate: str | None) -> None:
    if compensate is None:
        return
    for layer in body.layers:
        for part in parts_of(layer):
            if part.normed:
                raise InputError(
                    f"compensate={compensate!r}: a norm follows the down projection of the experts of layer "
                    f"{layer.index}: there is no least squares for them, pass None"
                )
            if compensate == "bias" and not part.has_bias:
                raise InputError(
                    f"compensate='bias': {part.name} has no bias that could take a mean: use 'least-squares' or None"
                )


def _check_cut(model: Any, body: ExpertAnatomy, plan: PruningPlan) -> None:
    """Silence what goes, and cut it out of a copy: both must say the same."""
    gone: NDArray[np.bool_] = ~plan.mask
    dense = answer(model)
    with change_mixture(model, np.flatnonzero(gone)):
        silenced = answer(model)
    trial = copy.deepcopy(model)
    for layer, kept in zip(expert_anatomy(trial).layers, plan.kept):
        cut_neurons(layer, kept)
    routes = {routed.module: lambda i, w: (i, w) for _, routed in expert_anatomy(trial).routed}
    with changing_experts(routes=routes):  # both are computed the same way
        check_difference("neurons", type(model).__name__, dense, silenced, lambda: answer(trial))
