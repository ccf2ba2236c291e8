"""Plan a cut, then cut."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError, check_option
from llmbrain._version import __version__
from llmbrain.anatomy.surgery import check_cuttable, keep_heads, keep_neurons
from llmbrain.checkpoints.shapes import RECORD, record_shapes
from llmbrain.hooks.text import as_windows, digest
from llmbrain.pruning.calibrate.moments import Moments
from llmbrain.pruning.calibrate.walk import Change, Site, walk
from llmbrain.pruning.calibrate.windows import calibration_windows, check_enough, check_weights
from llmbrain.pruning.forget.conditions import condition_weights
from llmbrain.pruning.forget.unlearning import unlearn
from llmbrain.pruning.plan import PruningPlan
from llmbrain.pruning.repair.least_squares import bias_only, choose_ridge, least_squares

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPENSATIONS = (None, "bias", "least-squares")
FALLBACK_RIDGE = 1e-2  # where there is too little text to hold some out


def prune(
    model: nn.Module,
    plan: PruningPlan,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Sequence[Any] | Tensor | None = None,
    compensate: str | None = None,
    ridge: float | None = None,
    intercept: bool = True,
    sequential: bool = True,
    window: int | None = None,
    max_windows: int | None = 128,
    weights: Tensor | None = None,
    inplace: bool = False,
) -> Any:
    """Cut what a plan removes out of a model's weights.

    Without compensation the result equals the model with those neurons set to zero.

    Parameters
    ----------
    model : transformers model
        Not changed unless `inplace`.
    plan : PruningPlan
        Made for these weights.
    tokenizer, calibration
        Texts, windows of token ids, or scans (whose tokens are taken), for the compensation.
    compensate : {None, "bias", "least-squares"}
        None: cut only. ``"bias"``: the mean of what goes moves to the output's bias (FLAP). ``"least-squares"``: refit
        the output projection to the dense model's output (ridge regression with intercept).
    ridge : float, optional
        Relative to the mean variance of the signals; default the one of `RIDGES` that errs least on held-out tokens.
    intercept : bool
        Whether least squares may add a bias to the output projections.
    sequential : bool
        Fit each layer to the signals it gets in the model as pruned so far, so that errors do not add up.
    window, max_windows : int, optional
        Cut of the calibration texts.
    weights : float tensor ``(n_windows, window)``, optional
        How much each calibration token counts. Default: as in the plan, where it was made with the same windows or
        keeps or forgets functions; else all alike.
    inplace : bool
        Cut `model` itself (needs no second copy in memory).

    Returns
    -------
    transformers model
        Smaller; what was done stands in its ``llmbrain_pruning`` attribute.

    Raises
    ------
    InputError
        If the plan is for another model, weights can not be cut, or calibration is missing or too short; `model` is
        untouched then.
    """
    check_option("compensate", compensate, COMPENSATIONS)
    plan.check_model(model)
    windows = None
    if compensate is not None:
        if calibration is None:
            raise InputError(f"compensate={compensate!r} needs calibration texts (and their tokenizer)")
        windows, by_condition = _calibrate(model, plan, tokenizer, calibration, window, max_windows)
        if weights is None:
            weights = plan.token_weights(windows) if by_condition is None else by_condition
        check_enough(windows, max(plan.widths_before))
        check_weights(weights, windows)
    small = model if inplace else copy.deepcopy(model)
    body = plan.check_model(small)
    check_cuttable(body)
    forgetting = None
    if windows is not None:

        def mend() -> None:
            options: dict[str, Any] = {"ridge": ridge, "intercept": intercept, "sequential": sequential}
            repair(small, plan, windows, kind=str(compensate), weights=weights, **options)

        functions = plan.details.get("functions", {})
        if functions.get("forget") and compensate == "least-squares":
            assert weights is not None
            assert not isinstance(calibration, (Tensor, type(None)))
            cut = [(layer.down, kept) for layer, kept in zip(body.layers, plan.kept)]
            cut += [
                (layer.out, kept) for layer, kept in zip(body.layers, plan.kept_heads or ()) if layer.out is not None
            ]
            forgetting = unlearn(small, windows, calibration, functions, cut, weights, mend)
        else:
            mend()
    for layer, kept in zip(body.layers, plan.kept):
        keep_neurons(layer, torch.from_numpy(kept))
    for layer, groups in zip(body.layers, plan.kept_heads or ()):
        if layer.out is not None and len(groups) < layer.out.units:
            keep_heads(layer, torch.from_numpy(groups))
    record_shapes(small)
    written = plan.to_dict()
    written["details"] = {k: v for k, v in plan.details.items() if k != "token_weights"}
    record = {
        "widths_before": list(plan.widths_before),
        "kept": [k.tolist() for k in plan.kept],
        "kept_heads": None if plan.kept_heads is None else [k.tolist() for k in plan.kept_heads],
        "plan": {k: v for k, v in written.items() if k not in ("kept", "kept_heads")},
        "compensate": compensate,
        "forgetting": forgetting,
        "calibration": None if windows is None else {"hash": digest(windows), "shape": list(windows.shape)},
        "versions": {"llmbrain": __version__, "torch": version("torch")},
    }
    setattr(small, RECORD, [*getattr(small, RECORD, []), record])
    return small


def _calibrate(
    model: nn.Module, plan: PruningPlan, tokenizer: Any, calibration: Any, window: int | None, max_windows: int | None
) -> tuple[Tensor, Tensor | None]:
    """Windows, and the weights of their tokens where a plan keeps or forgets functions and scans tell conditions."""
    functions = plan.details.get("functions")
    if isinstance(calibration, Tensor) or not all(hasattr(c, "token_ids") for c in calibration):
        if functions:
            raise InputError("this plan keeps or forgets functions: calibrate with the scans it was made from")
        return as_windows(model, tokenizer, calibration, window, max_windows), None
    windows = calibration_windows(model, tokenizer, None, calibration, window, max_windows)
    if windows is None:
        raise InputError("calibration: these scans carry no token ids")
    if not functions:
        return windows, None
    shape = (windows.shape[0], windows.shape[1])
    return windows, condition_weights(calibration, shape, functions["keep"], functions["forget"])


def repair(
    model: nn.Module,
    plan: PruningPlan,
    windows: Tensor,
    *,
    kind: str,
    ridge: float | None = None,
    intercept: bool = True,
    sequential: bool = True,
    weights: Tensor | None = None,
) -> None:
    """Write compensated output projections into a model, with zeros where the plan removes; shapes stay."""
    body = plan.check_model(model)

    def step(kept: Tensor, site: Site) -> Change | None:
        if len(kept) == site.output.units:
            return None if not sequential or plan.removed == 0 else fit(site, kept, kind, ridge, intercept)
        return fit(site, kept, kind, ridge, intercept)

    walk(
        model,
        body,
        windows,
        lambda site: step(torch.from_numpy(plan.kept[site.layer.index]), site),
        heads=None if plan.kept_heads is None else (
            lambda site: step(torch.from_numpy(plan.kept_heads[site.layer.index]), site)),  # type: ignore[index]
        sequential=sequential,
        weights=weights,
        progress="repair",
    )  # fmt: skip


def fit(
    site: Site,
    kept: Tensor,
    kind: str,
    ridge: float | None = None,
    intercept: bool = True,
    on: Moments | None = None,
) -> Change:
    """The repair of one output projection for the units that stay, fitted `on` all its moments or those given."""
    weight = site.weight
    columns = (site.output.rows(kept) - site.output.start).to(weight.device)
    if kind == "bias":
        return Change(kept, bias_only(on or site.all, weight, columns))
    if ridge is None:
        held = site.held_out.n > 0
        ridge = (
            choose_ridge(site.train, site.held_out, weight, columns, intercept=intercept) if held else FALLBACK_RIDGE
        )
    return Change(kept, least_squares(on or site.all, weight, columns, ridge=ridge, intercept=intercept))
