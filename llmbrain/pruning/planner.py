"""Make a `PruningPlan`: score units, spread the budget over layers, choose what stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, overload
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError, check_names, check_range, seed_of
from llmbrain.anatomy.experts import has_experts
from llmbrain.anatomy.families import Anatomy, anatomy
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.anatomy.surgery import Change, restored
from llmbrain.anatomy.units import HEADS, NEURONS, Units
from llmbrain.distributed import ranks
from llmbrain.hooks.text import digest
from llmbrain.networks import FunctionalNetworks
from llmbrain.pruning.allocate.blocks import BlockBudget, check_drop, check_measurable, check_whole, choose_blocks
from llmbrain.pruning.allocate.budget import Budget, given_widths
from llmbrain.pruning.allocate.search import PASSES, Allocator
from llmbrain.pruning.allocate.shares import uniform
from llmbrain.pruning.calibrate.steps import Measured
from llmbrain.pruning.calibrate.windows import Calibration, scans_with_tokens
from llmbrain.pruning.criteria import Material, criterion
from llmbrain.pruning.criteria.base import protection
from llmbrain.pruning.criteria.scorer import Scorer
from llmbrain.pruning.expert_neurons import Request, plan_expert_neurons
from llmbrain.pruning.experts import ExpertPlan, plan_experts
from llmbrain.pruning.forget.conditions import condition_numbers, condition_weights, token_conditions
from llmbrain.pruning.forget.neurons import LEVEL, neurons_to_forget
from llmbrain.pruning.plan import Kept, PruningPlan, check_protect, given_alike, parameters_removed, weights_digest
from llmbrain.pruning.repair.fit import fit
from llmbrain.scanning.manifest import warn_of_other_model
from llmbrain.scanning.scans import Scan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PlanOptions:
    """What `plan_pruning` takes beside the things that every plan needs.

    Attributes
    ----------
    multiple_of : int
        Widths of cut layers are multiples of it (8 to 256: what hardware likes).
    sequential : bool, optional
        Score each layer on the already pruned and repaired prefix. Default: where the method is meant so.
    passes : float
        Forward passes over the calibration text that ``"sensitivity"`` and ``"search"`` may take: a third of them
        measures layers alone, the rest whole allocations, 2.25 passes each.
    token_balance : float, optional
        With ``"networks"``: how far to go from equal tokens (0) to weights by what the networks leave unexplained (1),
        so that rare functions are not drowned by frequent ones: see `llmbrain.pruning.criteria.networks`. Default .5;
        with models of 20 layers and more 0. Weights of the calibration go first. `prune` takes the weights over from
        the plan.
    level : float
        Of `forget`: share of a condition's known tokens that may still be predicted.
    attribution : {"gradient", "relp"}
        Of `forget`: how it is found which neurons a condition needs.
    last : bool
        Of `forget`: make it last. The repair trains all weights against an adversary that learns it again: see
        `llmbrain.pruning.forget.unlearning`. The same neurons go.
    rule : dict, optional
        Options of the criterion's own: for ``"published"`` those of `published_scores`.
    drop : str or sequence of str
        ``"mlp"``, ``"attention"`` or both: MLPs and attentions that may be set to nothing, where that costs less than
        as many parameters of neurons, as measured: see `llmbrain.pruning.allocate.blocks.search_blocks`. With
        ``"attention"`` the ratio is met in parameters: as many go as with neurons alone.
    """

    multiple_of: int = 1
    sequential: bool | None = None
    passes: float = PASSES
    token_balance: float | None = None
    level: float = LEVEL
    attribution: str = "gradient"
    last: bool = False
    rule: dict[str, Any] | None = None
    drop: Sequence[str] | str = ()


CALIBRATION_OPTIONS = ("window", "max_windows", "weights")  # fields of `Calibration` that are taken as keywords too


@overload
def plan_pruning(
    model: nn.Module, networks: FunctionalNetworks | None = None, scans: Sequence[Scan] | None = None, *,
    expert_ratio: float, **options: Any,
) -> ExpertPlan: ...  # fmt: skip


@overload
def plan_pruning(
    model: nn.Module, networks: FunctionalNetworks | None = None, scans: Sequence[Scan] | None = None, *,
    expert_ratio: None = None, **options: Any,
) -> PruningPlan: ...  # fmt: skip


def plan_pruning(
    model: nn.Module,
    networks: FunctionalNetworks | None = None,
    scans: Sequence[Scan] | None = None,
    *,
    ratio: float | None = None,
    method: str = "networks",
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Calibration | Sequence[str] | Sequence[Scan] | Tensor | None = None,
    allocation: str | Sequence[int] | None = None,
    protect: Sequence[int] | None = None,
    head_ratio: float = 0.0,
    keep: Sequence[str] | None = None,
    forget: Sequence[str] | None = None,
    expert_ratio: float | None = None,
    random_state: int | None = 0,
    **options: Any,
) -> PruningPlan | ExpertPlan:
    """Choose which MLP neurons (and heads) of a model to remove; nothing is cut yet.

    In a process group every rank is given the same; the calibration windows are shared out, and all get the same plan.

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
        and an allocation of widths can do without.
    method : str
        A name in `CRITERIA`.
    tokenizer, calibration
        Texts, int64 windows ``(n, window)``, scans, or a `Calibration`.
    allocation : str or sequence of int, optional
        ``"uniform"``, ``"global"``, ``"clamped"``, ``"networks"`` (layers keep more where more of their neurons are in
        networks; with any method), ``"sensitivity"``, ``"search"``, or the widths themselves, which
        must be what `ratio`, `protect` and `multiple_of` allow. Default: the method's own (``"global"`` for
        ``"published"``, ``"search"`` for ``"networks"`` with models of fewer than 20 layers, else ``"uniform"``).
    protect : sequence of int, optional
        Layers that are not cut. Default: none; for ``"published"`` the first 3 and last 2 where there are more than 5,
        for ``"networks"`` the same where there are 20 or more. ``[]`` protects none.
    head_ratio : float
        Share of attention heads to remove, in whole key/value groups, by the same method and allocation. Networks that
        span neurons and heads (of ``scan.joined("neuron", "head")``) cover their key heads too.
    keep, forget : sequence of str, optional
        Conditions (of the scans' events) whose function is to stay, or to go: see `llmbrain.pruning.forget`. Both
        take the scans as calibration; `forget` first removes the neurons of
        `llmbrain.pruning.forget.neurons.neurons_to_forget`; with ``ratio=None`` no more than those, and with
        ``ratio=0, last=True`` none: the repair forgets by itself.
    expert_ratio : float, optional
        Of a mixture of experts: share of the routed experts to remove, in (0, 1); `ratio` is left out. Methods and
        allocations are those of `llmbrain.pruning.experts`; the plan is an `ExpertPlan`. With `ratio` the neurons
        inside all experts go: see `llmbrain.pruning.expert_neurons`.
    random_state : int, optional
        Of random scores and of FastICA.
    **options
        ``multiple_of``, ``sequential``, ``passes``, ``token_balance``, ``level``, ``attribution``, ``last``, ``rule``,
        ``drop`` (whole MLPs and attentions): see `PlanOptions`; and ``window``, ``max_windows``, ``weights`` of the
        calibration text: see `Calibration`.

    Returns
    -------
    PruningPlan

    Raises
    ------
    InputError
        If the ratio is impossible, the method unknown, or what it needs is missing or too short.
    """
    warn_of_other_model(networks, model)
    if expert_ratio is not None:
        beside = {"ratio": ratio, "protect": protect, "head_ratio": head_ratio or None, "keep": keep, "forget": forget}
        return _plan_experts(
            model, expert_ratio, method, beside, allocation, networks, tokenizer, calibration, random_state, options
        )
    criterion(method)
    text = {name: options.pop(name) for name in CALIBRATION_OPTIONS if name in options}
    given = Calibration.of(calibration, tokenizer, **text)
    how = plan_options(options)
    if not isinstance(how.last, bool):
        raise InputError(f"last={how.last!r} must be True or False")
    if not forget and (how.last or how.attribution != "gradient"):
        raise InputError(f"last={how.last}, attribution={how.attribution!r} are options of forget: say what is to go")
    if has_experts(model):
        whole = check_drop(how.drop) or criterion(method).blocks or None
        refused = {"head_ratio": head_ratio or None, "keep": keep, "forget": forget, "whole blocks": whole}
        return _plan_expert_neurons(model, ratio, method, refused, allocation, protect, given, scans, how, random_state)
    body = anatomy(model)
    functions: _Functions | None = None
    if keep or forget:
        if not scans or given.source is not None or given.weights is not None:
            raise InputError("keep and forget take scans with events as calibration (no calibration, no weights)")
        if forget and (allocation is not None or protect):
            raise InputError("forget says itself where to cut: leave allocation and protect away")
        functions = _functions(
            model, body, replace(given, source=list(scans)), ratio, how, list(check_names("keep", keep)),
            list(check_names("forget", forget)),
        )  # fmt: skip
        given = functions.calibration
        ratio = functions.ratio if forget else ratio
        allocation = functions.widths if functions.widths is not None else allocation
    elif given.source is None and scans_with_tokens(scans or ()):
        given = replace(given, source=list(scans or ()))
    if ratio is None and (allocation is None or isinstance(allocation, str)):
        raise InputError("ratio=None: say what share of the neurons to remove, in (0, 1)")
    protected = check_protect(protect, len(body.layers))
    own = criterion(method).blocks
    check_whole(method, own, check_drop(how.drop), ratio, allocation, head_ratio, functions is not None)
    if ratio is not None and functions is None and not own:
        Budget.of(body.widths, ratio, protected, how.multiple_of)  # fails before any work
    if head_ratio:
        HEADS.check(body, head_ratio)
        Budget.of(HEADS.counts(body), head_ratio, protected, name=HEADS.option)
    with ranks().job("plan", **given_alike(
        body, networks, method=method, ratio=ratio, allocation=allocation, head_ratio=head_ratio, protect=protect,
        options=vars(how), conditions=[keep, forget], counts=None if given.weights is None else digest(given.weights),
    )):  # fmt: skip
        planner = Planner(
            model, method, given.windows(model), networks=networks, scans=scans, random_state=random_state,
            weights=given.weights, token_balance=how.token_balance, rule=how.rule, passes=how.passes,
        )  # fmt: skip
        if functions is not None:
            planner.scorer.targets = functions.targets
            planner.material.details["functions"] = functions.record
        return planner.plan(
            ratio, allocation=allocation, protect=protect, multiple_of=how.multiple_of, sequential=how.sequential,
            head_ratio=head_ratio, drop=how.drop,
        )  # fmt: skip


def _plan_experts(
    model: nn.Module, expert_ratio: float, method: str, beside: dict[str, Any], allocation: str | Sequence[int] | None,
    networks: FunctionalNetworks | None, tokenizer: PreTrainedTokenizerBase | None, calibration: Any,
    random_state: int | None, options: dict[str, Any],
) -> ExpertPlan:  # fmt: skip
    given = [name for name, value in beside.items() if value is not None]
    if given:
        raise InputError(
            f"expert_ratio={expert_ratio} together with {', '.join(given)}: whole experts are removed alone; plan and "
            "prune neurons of the experts that stay afterwards"
        )
    text = {name: options.pop(name) for name in CALIBRATION_OPTIONS if name in options}
    plan_options(options)  # an unknown name is a TypeError
    if options or text.get("weights") is not None:
        raise InputError(f"expert_ratio={expert_ratio} takes no {', '.join(options) or 'weights'}")
    windows = (
        None if method in ("random", "networks") else Calibration.of(calibration, tokenizer, **text).windows(model)
    )
    return plan_experts(
        model, expert_ratio, method, windows, networks=networks, allocation=allocation, random_state=random_state
    )


def _plan_expert_neurons(
    model: nn.Module, ratio: float | None, method: str, refused: dict[str, Any], allocation: Any,
    protect: Sequence[int] | None, given: Calibration, scans: Sequence[Scan] | None, how: PlanOptions,
    random_state: int | None,
) -> PruningPlan:  # fmt: skip
    named = [name for name, value in refused.items() if value is not None]
    if named:
        raise InputError(f"{', '.join(named)}: of a mixture of experts neurons are removed alone (no heads, functions)")
    if ratio is None:
        raise InputError("ratio=None: say what share of the neurons of every expert to remove, in (0, 1)")
    if given.source is None and scans_with_tokens(scans or ()):
        given = replace(given, source=list(scans or ()))
    asked = Request(
        ratio, method, given.windows(model), given.weights, allocation, protect, how.multiple_of, how.sequential,
        random_state,
    )  # fmt: skip
    return plan_expert_neurons(model, asked)


def plan_options(options: dict[str, Any]) -> PlanOptions:
    """The options as one object; an unknown name is a `TypeError`, as of any function."""
    unknown = sorted(set(options) - {f.name for f in fields(PlanOptions)})
    if unknown:
        raise TypeError(f"plan_pruning() got unexpected keyword arguments {unknown}")
    return PlanOptions(**options)


@dataclass(frozen=True)
class _Functions:
    """What keeping or forgetting functions asks of a plan."""

    calibration: Calibration
    record: dict[str, Any]
    ratio: float | None = None
    widths: tuple[int, ...] | None = None
    targets: NDArray[np.bool_] | None = None


def _functions(
    model: nn.Module, body: Anatomy, calibration: Calibration, ratio: float | None, how: PlanOptions,
    keep: Sequence[str], forget: Sequence[str],
) -> _Functions:  # fmt: skip
    windows = calibration.windows(model)
    assert windows is not None
    scans = calibration.scans or []
    shape = (windows.shape[0], windows.shape[1])
    weights = condition_weights(scans, shape, keep, forget)
    if both := sorted(set(keep) & set(forget)):
        raise InputError(f"keep and forget both name {both}: a condition stays or goes")
    record: dict[str, Any] = {"keep": list(keep), "forget": list(forget)}
    text = Calibration(windows, max_windows=None, weights=weights)
    if not forget:
        return _Functions(text, record)
    check_range("level", how.level, 0, 1)
    if ratio is not None:  # 0: nothing is cut, and the repair that lasts forgets alone
        check_range("ratio", ratio, 0, 1, open_low=not how.last, open_high=True)
    labels, names = token_conditions(scans, shape)
    wanted = condition_numbers("forget", forget, names)
    if len(wanted) == len(names):
        raise InputError(f"forget={list(forget)} names every condition: nothing would be left")
    space, multiple = NeuronSpace(body.widths), how.multiple_of
    most = None if ratio is None else round(ratio * space.n_neurons)
    found = neurons_to_forget(
        model, body, windows, labels, names, wanted, most=most, level=how.level, attribution=how.attribution
    )
    if how.last:
        record["last"] = True
    counts = [int(found.gone[space.layer_slice(i)].sum()) for i in range(len(body.layers))]
    record |= {"targets": sum(counts), "left": found.left}
    if ratio == 0:
        return _Functions(text, record, None, tuple(body.widths), found.gone)
    if not sum(counts):
        raise InputError(f"forget={list(forget)}: no neuron is needed for it")
    widths = tuple(w if not c else max(1, (w - c) // multiple * multiple) for w, c in zip(body.widths, counts))
    if most is None:
        ratio = 1 - sum(widths) / space.n_neurons
    else:
        widths = uniform(Budget(widths, space.n_neurons - most, (), multiple))
    return _Functions(text, record, ratio, widths, found.gone)


class Planner:
    """Plans of one model, method and calibration, at any ratio: what ratios share is done once.

    Parameters
    ----------
    model : transformers model
        Dense, now.
    method : str
        A name in `CRITERIA`.
    windows : (n, window) int64, optional
        Calibration text.
    networks, scans, random_state, weights, token_balance, rule, passes
        As in `plan_pruning`, `PlanOptions` and `Calibration`.

    Attributes
    ----------
    scorer : Scorer
    allocator : Allocator
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        windows: Tensor | None = None,
        *,
        networks: FunctionalNetworks | None = None,
        scans: Sequence[Scan] | None = None,
        random_state: int | None = 0,
        weights: Tensor | None = None,
        token_balance: float | None = None,
        rule: dict[str, Any] | None = None,
        passes: float = PASSES,
    ) -> None:
        self.model, self.body, self.windows = model, anatomy(model), windows
        seed = int(ranks().told("seed", lambda: seed_of(random_state)))
        self.material = Material(
            model, self.body, windows, weights, networks, scans or (), seed, token_balance,
            dict(rule or {}),
        )  # fmt: skip
        self.scorer = Scorer(method, self.material)
        self.allocator = Allocator(self.scorer, passes)

    def plan(
        self,
        ratio: float | None,
        *,
        allocation: str | Sequence[int] | None = None,
        protect: Sequence[int] | None = None,
        multiple_of: int = 1,
        sequential: bool | None = None,
        head_ratio: float = 0.0,
        drop: Sequence[str] | str = (),
    ) -> PruningPlan:
        """The plan of one ratio; parameters as in `plan_pruning`."""
        criterion, material, body = self.scorer.criterion, self.material, self.body
        notes: list[str] = []
        n = len(body.layers)
        named = allocation if isinstance(allocation, str) or allocation is None else "given"
        widths: tuple[int, ...] | None = None
        if allocation is not None and not isinstance(allocation, str):  # they say themselves what is protected
            protected = check_protect(protect, n)
            alone = bool(material.details.get("functions", {}).get("last"))  # its repair forgets without a cut, too
            widths = given_widths(allocation, body.widths, ratio, protected, multiple_of, whole=alone)
            ratio = 1 - sum(widths) / sum(body.widths) if ratio is None else ratio
        else:
            protected = check_protect(
                protection(criterion, body.widths, ratio, notes) if protect is None else protect, n
            )
        if ratio is None:
            raise InputError("ratio=None: say what share of the neurons to remove, in (0, 1)")
        named = named or criterion.spread(n)
        if named != "given":
            self.allocator.check(named)
        budgets: dict[Units, Budget] = {}
        drop = check_drop(drop)
        check_whole(criterion.name, criterion.blocks, drop, ratio, allocation, head_ratio)
        if not criterion.blocks:
            NEURONS.check(body, ratio)
        if criterion.blocks or drop:
            check_measurable(material, drop)
            if not criterion.blocks:
                named = allocation if isinstance(allocation, str) else criterion.spread(n)
        elif widths is None:
            budgets[NEURONS] = Budget.of(body.widths, ratio, protected, multiple_of)
        if head_ratio:
            HEADS.check(body, head_ratio)
            budgets[HEADS] = Budget.of(HEADS.counts(body), head_ratio, protected, name=HEADS.option)
            self.scorer.learn(HEADS)  # while the model is dense
        self.allocator.kinds = 2 if head_ratio else 1
        sequential = self.windows is not None and (criterion.sequential if sequential is None else sequential)
        if criterion.blocks or drop:
            given = BlockBudget(body, ratio, protected, multiple_of)
            counts, details = choose_blocks(self.allocator, given, drop, named, sequential=sequential)
            named = "blocks" if criterion.blocks else named
        else:
            counts, details = self._counts(named, widths, budgets, sequential=sequential)
        kept = self._choose(counts, sequential=sequential)
        details |= criterion.facts(self.scorer.dense_scores, kept[NEURONS], protected)
        if self.windows is not None:
            details["calibration"] = {"hash": digest(self.windows), "shape": list(self.windows.shape)}
        if self.scorer.balanced and material.weights is not None:
            details["token_weights"] = np.round(material.weights.numpy().astype(float), 2).tolist()
        return PruningPlan(
            method=criterion.name,
            allocation=named,
            ratio=float(ratio),
            kept=kept[NEURONS],
            widths_before=body.widths,
            digest=weights_digest(body),
            kept_heads=kept.get(HEADS),
            groups_before=HEADS.counts(body),
            protect=protected,
            parameters=sum(p.numel() for p in self.model.parameters()),
            parameters_removed=parameters_removed(body, kept),
            details={**material.details, **details, "notes": [*material.notes, *notes]},
            _model=ref(self.model),
        )

    def _counts(
        self, named: str, widths: tuple[int, ...] | None, budgets: dict[Units, Budget], *, sequential: bool
    ) -> tuple[dict[Units, tuple[int, ...]], dict[str, Any]]:
        """How many units of each kind each layer keeps (heads by the same share where only widths are given)."""
        counts: dict[Units, tuple[int, ...]] = {}
        facts: dict[str, Any] = {}
        if HEADS in budgets:
            counts[HEADS] = self.allocator.spread("uniform" if named == "given" else named, budgets[HEADS], HEADS)
            facts |= self.allocator.facts(named, HEADS)
        if widths is not None:
            return {**counts, NEURONS: widths}, facts
        best = self.allocator.spread(named, budgets[NEURONS])
        facts |= self.allocator.facts(named, NEURONS)
        if named == "search":
            best, tried = self.allocator.search(best, budgets[NEURONS], counts, sequential=sequential)
            facts |= tried
        return {**counts, NEURONS: best}, facts

    def _choose(self, counts: dict[Units, tuple[int, ...]], *, sequential: bool) -> dict[Units, Kept]:
        """The best units of each layer; sequentially, on the prefix as pruned and refitted so far."""
        if not sequential:
            return {units: self.scorer.best(counts[units], units) for units in (NEURONS, HEADS) if units in counts}
        none = np.zeros(0, dtype=np.int64)
        kept: dict[Units, list[NDArray[np.int64]]] = {units: [none] * len(self.body.layers) for units in counts}

        def step(measured: Measured, chosen: NDArray[np.int64]) -> Change | None:
            last = measured.layer is self.body.layers[-1] and measured.units is NEURONS
            if last or len(chosen) == measured.output.units:
                return None
            return fit(measured, torch.from_numpy(chosen), "least-squares")

        with restored(self.body.layers, list(counts)):
            self.scorer.cut("choose", step, counts, sequential=True, took=lambda of, i, x: kept[of].__setitem__(i, x))
        return {units: tuple(of) for units, of in kept.items()}
