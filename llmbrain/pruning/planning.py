"""Make a `PruningPlan`: score units, spread the budget over layers, choose what stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llmbrain._validation import InputError, check_range
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.pruning.allocate.widths import Budget, uniform
from llmbrain.pruning.calibrate.windows import calibration_windows
from llmbrain.pruning.criteria import criterion
from llmbrain.pruning.criteria.networks import BALANCE
from llmbrain.pruning.forget.conditions import condition_numbers, condition_weights, token_conditions
from llmbrain.pruning.forget.neurons import LEVEL, neurons_to_forget
from llmbrain.pruning.plan import PruningPlan, check_protect
from llmbrain.pruning.planner import PASSES, Planner, groups_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def plan_pruning(
    model: nn.Module,
    networks: Any = None,
    scans: Sequence[Any] | None = None,
    *,
    ratio: float | None = None,
    method: str = "networks",
    protect: Sequence[int] | None = None,
    random_state: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Sequence[str] | Tensor | None = None,
    allocation: str | Sequence[int] | None = None,
    sequential: bool | None = None,
    multiple_of: int = 1,
    head_ratio: float = 0.0,
    passes: float = PASSES,
    window: int | None = None,
    max_windows: int | None = 128,
    weights: Tensor | None = None,
    token_balance: float = BALANCE,
    keep: Sequence[str] | None = None,
    forget: Sequence[str] | None = None,
    level: float = LEVEL,
    rule: dict[str, Any] | None = None,
) -> PruningPlan:
    """Choose which MLP neurons (and heads) of a model to remove; nothing is cut yet.

    Parameters
    ----------
    model : transformers model
        Not changed.
    networks : FunctionalNetworks, optional
        For methods that use them.
    scans : sequence of Scan, optional
        For ``"published"``: with the sites ``gate`` and ``up`` (recorded from `calibration` if not given). Their tokens
        serve as calibration where none is given.
    ratio : float
        Share of all MLP neurons to remove, in (0, 1); met exactly, or as nearly as `multiple_of` allows. Only `forget`
        can do without.
    method : str
        A name in `CRITERIA`.
    protect : sequence of int, optional
        Layers that are not cut. Default: none; for ``"published"`` the first 3 and last 2 where there are more than 5.
    random_state : int
        Of random scores and of FastICA.
    tokenizer, calibration
        Texts, or int64 windows ``(n, window)``.
    allocation : str or sequence of int, optional
        ``"uniform"``, ``"global"``, ``"clamped"``, ``"sensitivity"``, ``"search"`` or the widths themselves. Default:
        ``"global"`` for ``"published"``, ``"search"`` for ``"networks"``, else ``"uniform"``.
    sequential : bool, optional
        Score each layer on the already pruned and repaired prefix. Default: where the method is meant so.
    multiple_of : int
        Widths of cut layers are multiples of it (8 to 256: what hardware likes).
    head_ratio : float
        Share of attention heads to remove, in whole key/value groups, by the same method and allocation. Networks that
        span neurons and heads (of ``scan.joined("neuron", "head")``) cover their key heads too.
    passes : float
        Forward passes over the calibration text that ``"sensitivity"`` and ``"search"`` may take: a third of them
        measures layers alone, the rest whole allocations, 2.25 passes each.
    window, max_windows : int, optional
        Cut of the calibration texts.
    weights : float tensor ``(n_windows, window)``, optional
        How much each calibration token counts.
    token_balance : float
        With ``"networks"``: how far to go from equal tokens (0) to weights by what the networks leave unexplained (1),
        so that rare functions are not drowned by frequent ones: see `llmbrain.pruning.criteria.networks`. `weights` go
        first. `prune` takes the weights over from the plan.
    keep, forget : sequence of str, optional
        Conditions (of the scans' events) whose function is to stay, or to go: see
        `llmbrain.pruning.forget.conditions`. Both take the scans as calibration; `forget` first removes the neurons of
        `llmbrain.pruning.forget.neurons.neurons_to_forget`; with ``ratio=None`` no more than those.
    level : float
        Of `forget`: share of a condition's known tokens that may still be predicted.
    rule : dict, optional
        Options of `published_scores`.

    Returns
    -------
    PruningPlan

    Raises
    ------
    InputError
        If the ratio is impossible, the method unknown, or what it needs is missing or too short.
    """
    criterion(method)
    body = anatomy(model)
    details: dict[str, Any] = {}
    targets = None
    if keep or forget:
        if not scans or calibration is not None or weights is not None:
            raise InputError("keep and forget take scans with events as calibration (no calibration, no weights)")
        windows = calibration_windows(model, tokenizer, None, scans, window, max_windows)
        assert windows is not None
        shape = (windows.shape[0], windows.shape[1])
        weights = condition_weights(scans, shape, keep, forget)
        details["functions"] = {"keep": list(keep or ()), "forget": list(forget or ())}
        if forget:
            check_range("level", level, 0, 1)
            if ratio is not None:
                check_range("ratio", ratio, 0, 1, open_low=True, open_high=True)
            if allocation is not None or protect:
                raise InputError("forget says itself where to cut: leave allocation and protect away")
            labels, names = token_conditions(scans, shape)
            wanted = condition_numbers("forget", forget, names)
            if len(wanted) == len(names):
                raise InputError(f"forget={list(forget)} names every condition: nothing would be left")
            space = NeuronSpace(body.widths)
            most = None if ratio is None else round(ratio * space.n_neurons)
            found = neurons_to_forget(model, body, windows, labels, names, wanted, most=most, level=level)
            targets = found.gone
            counts = [int(targets[space.layer_slice(i)].sum()) for i in range(len(body.layers))]
            details["functions"] |= {"targets": sum(counts), "left": found.left}
            if not sum(counts):
                raise InputError(f"forget={list(forget)}: no neuron is needed for it")
            rest = tuple(max(1, w - c) for w, c in zip(body.widths, counts))
            ratio = sum(counts) / space.n_neurons if most is None else ratio
            allocation = rest if most is None else uniform(Budget(rest, space.n_neurons - most, (), multiple_of))
    if ratio is None:
        raise InputError("ratio=None: say what share of the neurons to remove, in (0, 1)")
    protected = check_protect(protect, len(body.layers))
    Budget.of(body.widths, ratio, protected, multiple_of)  # fails before any work
    if head_ratio:
        Budget.of(groups_of(body, head_ratio), head_ratio, protected, name="head_ratio")
    windows = calibration_windows(model, tokenizer, calibration, scans, window, max_windows)
    planner = Planner(
        model, method, windows, networks=networks, scans=scans, random_state=random_state, weights=weights,
        token_balance=token_balance, rule=rule, passes=passes,
    )  # fmt: skip
    planner.scorer.targets = targets
    planner.scorer.details.update(details)
    return planner.plan(
        ratio, allocation=allocation, protect=protect, multiple_of=multiple_of, sequential=sequential,
        head_ratio=head_ratio,
    )  # fmt: skip
