"""Carry out a plan: repair what stays, cut what goes, record what was done."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from hashlib import sha256
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError, check_option, check_range, shown
from llmbrain._version import __version__
from llmbrain.anatomy.families import Anatomy, anatomy
from llmbrain.anatomy.offload import check_in_memory
from llmbrain.anatomy.surgery import check_cuttable
from llmbrain.anatomy.units import Units
from llmbrain.checkpoints.shapes import RECORD, record_shapes
from llmbrain.distributed import ranks
from llmbrain.hooks.change import refuse_changed
from llmbrain.hooks.text import digest
from llmbrain.pruning.calibrate.steps import Propagation
from llmbrain.pruning.calibrate.windows import Calibration, check_enough, check_weights
from llmbrain.pruning.expert_cut import prune_expert_neurons
from llmbrain.pruning.experts import ExpertPlan, prune_experts
from llmbrain.pruning.forget.conditions import condition_weights
from llmbrain.pruning.forget.relearning import Known, Relearning, attacked, split_lines
from llmbrain.pruning.forget.unlearning import unlearn
from llmbrain.pruning.plan import Kept, PruningPlan
from llmbrain.pruning.repair.fit import repair
from llmbrain.pruning.repair.propagation import propagation_of
from llmbrain.pruning.verify import check_cache, check_cut_is_zeroing, take
from llmbrain.scanning.scans import Scan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PARTS = ("weight", "bias")
COMPENSATIONS = (None, "bias", "least-squares")


def prune(
    model: nn.Module,
    plan: PruningPlan | ExpertPlan,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Calibration | Sequence[str] | Sequence[Scan] | Tensor | None = None,
    compensate: str | None = None,
    ridge: float | None = None,
    intercept: bool = True,
    sequential: bool = True,
    propagation: float | None = None,
    inplace: bool = False,
    verify: bool = True,
    relearning: bool | Relearning = True,
    record_indices: bool = True,
    **text: Any,
) -> PreTrainedModel:
    """Cut what a plan removes out of a model's weights.

    Without compensation the result equals the model with those neurons set to zero. In a process group every rank is
    given the same; the calibration windows are shared out, and all get the same smaller model.

    Parameters
    ----------
    model : transformers model
        Not changed unless `inplace`.
    plan : PruningPlan
        Made for these weights.
    tokenizer, calibration
        Texts, windows of token ids, scans (whose tokens are taken), or a `Calibration`, for the compensation. Where it
        has no weights, tokens count as in the plan, if that was made with the same windows or keeps or forgets
        functions; else all alike.
    compensate : {None, "bias", "least-squares"}
        None: cut only. ``"bias"``: the mean of what goes moves to the output's bias (FLAP). ``"least-squares"``: refit
        the output projection to the dense model's output (ridge regression with intercept).
    ridge : float, optional
        Relative to the mean variance of the signals; default the one of `RIDGES` that errs least on held-out tokens.
    intercept : bool
        Whether least squares may add a bias to output projections that have none.
    sequential : bool
        Fit each layer to the signals it gets in the model as pruned so far, so that errors do not add up.
    propagation : float, optional
        Share, 0 to 1, of the error that earlier layers left in the hidden states which least squares give to a layer to
        make up (QEP, arXiv 2504.09629). Default .5 with models of 20 layers and more whose blocks allow it, else 0.
    inplace : bool
        Cut `model` itself (needs no second copy in memory). All is checked first. An error or interruption during the
        compensation leaves it as it was; one during the cut itself says that the model must be loaded again.
    verify : bool
        Try on a copy of one block (of the model, where it is small) that cutting equals silencing, first.
    relearning : bool or Relearning
        Of a plan that forgets: attack the result by teaching it again (`llmbrain.pruning.forget.relearning`); what came
        of it stands in the record, ``["forgetting"]["relearning"]``. It trains four copies of the small model, one
        after the other, by default 60 steps of 8 lines each (the repair takes 160 of 2,048 tokens); False leaves it
        out.
    record_indices : bool
        Whether the record, and so ``pruning.json``, names the neurons that went. Of a model that is to have forgotten
        something they tell where to look. Without them it can not be saved as ``"masked"``.
    **text
        ``window``, ``max_windows``, ``weights`` of the calibration text: see `Calibration`.

    Returns
    -------
    transformers model
        Smaller; what was done stands in its ``llmbrain_pruning`` attribute.

    Raises
    ------
    InputError
        If the plan is for another model, weights can not be cut, cutting them is not the same as silencing them,
        calibration is missing or too short, or an intervention is in force; `model` is untouched then.
    """
    check_option("compensate", compensate, COMPENSATIONS)
    if not isinstance(relearning, (bool, Relearning)):
        raise InputError(f"relearning={relearning!r} must be True, False or a Relearning")
    if not isinstance(plan, (PruningPlan, ExpertPlan)):
        raise InputError(f"plan={shown(plan)} is no plan: see `plan_pruning` and `PruningPlan.load`")
    if ridge is not None:
        check_range("ridge", ridge, 0)
    if isinstance(plan, ExpertPlan) or plan.experts_before is not None:
        if not record_indices:
            raise InputError("record_indices=False: a cut of experts, or of neurons in them, names what went")
        if propagation:
            raise InputError(f"propagation={propagation}: the repair of experts does not know it, use 0")
        given = Calibration.of(calibration, tokenizer, **text)
        windows = given.windows(model) if compensate is not None else None
        if compensate is not None and windows is None:
            raise InputError(f"compensate={compensate!r} needs calibration texts (and their tokenizer)")
        if windows is not None:
            check_weights(given.weights, windows)
        how: dict[str, Any] = {
            "windows": windows, "weights": None if windows is None else given.weights, "compensate": compensate,
            "ridge": ridge, "sequential": sequential, "inplace": inplace, "verify": verify,
        }  # fmt: skip
        if isinstance(plan, ExpertPlan):
            return prune_experts(model, plan, **how)
        return prune_expert_neurons(model, plan, **how)
    refuse_changed(model, "prune")
    check_in_memory(model, "prune")
    functions = plan.details.get("functions", {})
    if functions.get("last") and compensate != "least-squares":
        raise InputError(f"compensate={compensate!r}: it is the repair by least squares that makes forgetting last")
    if inplace and functions.get("last"):
        raise InputError("inplace=True: a repair that makes forgetting last trains all weights, so it needs a copy")
    body, kept = plan.check_model(model), plan.kept_units
    for units, of in kept.items():
        check_cuttable(body, units, [len(k) for k in of])
    given, windows, token_weights = Calibration.of(calibration, tokenizer, **text), None, None
    if compensate is not None:
        windows, token_weights = repair_text(model, plan, given, compensate)
    if verify:
        check_cut_is_zeroing(model, body, kept, windows)
    carry = propagation_of(model, body, windows, propagation, compensate=compensate, sequential=sequential,
                           functions=bool(functions))  # fmt: skip
    forget = functions.get("forget") or []
    attack = Relearning() if relearning is True else relearning
    known = _known(model, given, forget, attack) if forget and attack else None  # while the model is dense
    small = model if inplace else copy.deepcopy(model)
    body = anatomy(small)
    forgetting: dict[str, Any] | None = None
    team = ranks()
    if windows is not None:

        def mend() -> None:
            repair(small, body, windows, kept, kind=str(compensate), ridge=ridge, intercept=intercept,
                   sequential=sequential, weights=token_weights, carry=carry)  # fmt: skip

        facts: dict[str, Any] = {}
        if team.size > 1:
            counts = None if token_weights is None else digest(token_weights)
            facts = {"plan": _digest(plan), "compensate": compensate, "ridge": ridge, "intercept": intercept,
                     "sequential": sequential, "propagation": propagation, "windows": digest(windows),
                     "token weights": counts}  # fmt: skip
        with _undone_on_error(body, kept) if inplace else nullcontext(), team.job("repair", **facts):
            if functions.get("forget") and compensate == "least-squares":
                assert token_weights is not None
                cuts = [
                    (output, stays)
                    for units, of in kept.items()
                    for layer, stays in zip(body.layers, of)
                    if (output := units.output(layer)) is not None
                ]
                forgetting = unlearn(small, windows, given.scans or [], functions, cuts, token_weights, mend)
            else:
                mend()
    try:
        for units, of in kept.items():
            for layer, stays in zip(body.layers, of):
                take(layer, units, stays)
        record_shapes(small)
        if verify and plan.dropped["attention"]:
            check_cache(small, windows)
    except BaseException as error:
        if inplace:
            error.add_note("the model was being cut in place when this happened: part of it is cut, load it again")
        raise
    if forget and attack:
        left_out = {"left_out": "calibration has no events of what was forgotten, or one only"}
        found = left_out if known is None else attacked(small, given.scans or [], forget, known, attack)
        forgetting = {**(forgetting or {}), "relearning": found}
    record = record_of(plan, compensate, forgetting, windows, carry)
    if not record_indices:
        record |= {"kept": None, "kept_heads": None, "indices": "left out"}
    setattr(small, RECORD, [*getattr(small, RECORD, []), record])
    return small


def _digest(plan: PruningPlan) -> str:
    return sha256(json.dumps(plan.to_dict(), sort_keys=True, default=str).encode()).hexdigest()[:16]


def _known(model: nn.Module, given: Calibration, forget: Sequence[str], attack: Relearning) -> Known | None:
    """What the dense model knows of lines that the attack is measured on; None where there are none."""
    lines = split_lines(given.scans or [], forget, attack)
    return Known(model, lines[1]) if all(lines) else None


@contextmanager
def _undone_on_error(body: Anatomy, kept: Mapping[Units, Kept]) -> Iterator[None]:
    """Where the block ends in an error or an interruption, output projections are as before; copies are on the CPU."""
    modules: list[Any] = [p.module for layer in body.layers for units in kept if (p := units.output(layer)) is not None]
    saved = [
        tuple(None if (p := getattr(m, name, None)) is None else p.detach().to("cpu", copy=True) for name in PARTS)
        for m in modules
    ]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for module, before in zip(modules, saved):
                for name, value in zip(PARTS, before):
                    if value is None:
                        setattr(module, name, None)
                    else:
                        getattr(module, name).copy_(value)
        raise


def repair_text(
    model: nn.Module, plan: PruningPlan, given: Calibration, compensate: str
) -> tuple[Tensor, Tensor | None]:
    """Windows to repair on, and how much their tokens count: as said, as conditions tell, or as in the plan."""
    windows = given.windows(model)
    if windows is None:
        raise InputError(f"compensate={compensate!r} needs calibration texts (and their tokenizer)")
    functions, weights = plan.details.get("functions"), given.weights
    if functions and given.scans is None:
        raise InputError("this plan keeps or forgets functions: calibrate with the scans it was made from")
    if weights is None and functions:
        shape = (windows.shape[0], windows.shape[1])
        weights = condition_weights(given.scans or [], shape, functions["keep"], functions["forget"])
    elif weights is None:
        weights = plan.token_weights(windows)
    check_enough(windows, max(plan.widths_before))
    check_weights(weights, windows)
    return windows, weights


def record_of(
    plan: PruningPlan,
    compensate: str | None,
    forgetting: dict[str, Any] | None,
    windows: Tensor | None,
    carry: Propagation | None = None,
) -> dict[str, Any]:
    """What was done, as plain JSON values."""
    written = plan.to_dict()
    written["details"] = {k: v for k, v in plan.details.items() if k != "token_weights"}
    return {
        "widths_before": list(plan.widths_before),
        "kept": written.pop("kept"),
        "kept_heads": written.pop("kept_heads"),
        "plan": written,
        "compensate": compensate,
        "propagation": None if carry is None else carry.share,
        "forgetting": forgetting,
        "calibration": None if windows is None else {"hash": digest(windows), "shape": list(windows.shape)},
        "versions": {"llmbrain": __version__, "torch": version("torch")},
    }
