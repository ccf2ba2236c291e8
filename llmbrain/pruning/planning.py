"""Make a `PruningPlan`: score units, spread the budget over layers, choose what stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError, check_option, check_range
from llmbrain.architectures import Anatomy, anatomy
from llmbrain.evaluation.perplexity import mean_loss
from llmbrain.evaluation.windows import fingerprint
from llmbrain.pruning.allocation import ALLOCATIONS, LEVELS, Budget, from_losses, ranked, uniform
from llmbrain.pruning.api import fit
from llmbrain.pruning.calibration import calibration_windows, check_enough, signals_of_windows
from llmbrain.pruning.compensation import least_squares
from llmbrain.pruning.criteria import Criterion, Evidence, criterion
from llmbrain.pruning.functions import (
    SELECTIVE,
    condition_selectivity,
    condition_weights,
    neurons_to_forget,
    token_conditions,
)
from llmbrain.pruning.network_terms import COVER, balanced_weights, covered, layer_masks, time_courses
from llmbrain.pruning.plan import Kept, PruningPlan, check_protect, parameters_removed, weights_fingerprint
from llmbrain.pruning.published import published_scores
from llmbrain.pruning.statistics import gradient_pass
from llmbrain.pruning.walk import Change, Site, restored, split_windows, walk, write
from llmbrain.space import NeuronSpace
from llmbrain.surgery import check_cuttable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUP_SIZE = 40  # texts in a group of the published rule
LOSS_TOKENS = 8192  # tokens on which allocations are measured
SCAN_RIDGE = 1e-3  # of the fits that allocations are measured with


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
    window: int | None = None,
    max_windows: int | None = 128,
    weights: Tensor | None = None,
    token_balance: float = 0.0,
    keep: Sequence[str] | None = None,
    forget: Sequence[str] | None = None,
    selectivity: float = SELECTIVE,
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
        Share of attention heads to remove, in whole key/value groups, by the same method.
    window, max_windows : int, optional
        Cut of the calibration texts.
    weights : float tensor ``(n_windows, window)``, optional
        How much each calibration token counts.
    token_balance : float
        With ``"networks"``: how far to go from equal tokens (0) to the same total weight for every network (1). Worth a
        try (0.5) where calibration text is unbalanced; on balanced text it costs perplexity.
    keep, forget : sequence of str, optional
        Conditions (of the scans' events) whose function is to stay, or to go: see `llmbrain.pruning.functions`. Both
        take the scans as calibration; `forget` first removes the neurons `selectivity` times as
        active under its conditions as under any other; with ``ratio=None`` no more than those.
    selectivity : float
        Lower it towards 1 where too little is forgotten.
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
    chosen = criterion(method)
    body = anatomy(model)
    check_cuttable(body)
    n = len(body.layers)
    check_range("token_balance", token_balance, 0, 1)
    notes: list[str] = []
    details: dict[str, Any] = {"notes": notes}
    if protect is None and method == "published":
        protect = (0, 1, 2, n - 2, n - 1) if n > 5 else ()
        if n <= 5:
            notes.append(f"the published rule keeps the first 3 and last 2 layers; with {n} layers none is protected")
    protected = check_protect(protect, n)
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
            if ratio is not None:
                check_range("ratio", ratio, 0, 1, open_low=True, open_high=True)
            if allocation is not None or protected:
                raise InputError("forget says itself where to cut: leave allocation and protect away")
            labels, names = token_conditions(scans, shape)
            selective = condition_selectivity(model, body, windows, labels, names, forget)
            space = NeuronSpace(body.widths)
            most = None if ratio is None else round(ratio * space.n_neurons)
            targets = neurons_to_forget(selective, selectivity, most)
            counts = [int(targets[space.layer_slice(i)].sum()) for i in range(n)]
            details["functions"]["targets"] = sum(counts)
            if not sum(counts):
                raise InputError(
                    f"forget={list(forget)}: no neuron is {selectivity} times as active for it: lower selectivity"
                )
            rest = tuple(max(1, w - c) for w, c in zip(body.widths, counts))
            ratio = sum(counts) / space.n_neurons if most is None else ratio
            allocation = rest if most is None else uniform(Budget(rest, space.n_neurons - most, (), multiple_of))
    if ratio is None:
        raise InputError("ratio=None: say what share of the neurons to remove, in (0, 1)")
    budget = Budget.of(body.widths, ratio, protected, multiple_of)
    if allocation is None:
        allocation = {"published": "global", "networks": "search"}.get(method, "uniform")
    if isinstance(allocation, str):
        check_option("allocation", allocation, ALLOCATIONS)
    windows = calibration_windows(model, tokenizer, calibration, scans, window, max_windows)
    if windows is None and (chosen.needs & {"moments", "metric", "taylor"} or allocation in ("sensitivity", "search")):
        raise InputError(f"method={method!r}, allocation={allocation!r} need calibration texts (or scans with tokens)")
    if windows is not None and chosen.needs & {"moments", "metric", "taylor"}:
        check_enough(windows, max(body.widths))
    if method == "networks":
        if networks is None:
            notes.append("no networks given: tokens count alike, nothing is covered")
        elif token_balance and weights is None and windows is not None:
            courses = time_courses(model, body, windows, networks)
            weights = balanced_weights(courses, token_balance)
        if networks is not None:
            details["networks"] = {"n": len(networks.maps), "token_balance": token_balance, "cover": COVER}
    planner = Planner(model, body, chosen, windows, networks, random_state, weights)
    if "published" in chosen.needs:
        details["published"] = planner.score_by_rule(scans, notes, rule or {})
    planner.targets = targets
    widths = planner.allocate(allocation, budget, details)
    sequential = chosen.sequential if sequential is None else sequential
    groups = planner.head_budget(head_ratio)
    kept, kept_heads = planner.choose(widths, groups, sequential=sequential and windows is not None)
    if method == "published":
        details["threshold"] = planner.threshold(kept, protected)
    if windows is not None:
        details["calibration"] = {"hash": fingerprint(windows), "shape": list(windows.shape)}
    return PruningPlan(
        method=method,
        allocation=allocation if isinstance(allocation, str) else "given",
        ratio=float(ratio),
        kept=kept,
        widths_before=body.widths,
        fingerprint=weights_fingerprint(body),
        kept_heads=kept_heads,
        groups_before=tuple(layer.out.units if layer.out is not None else 0 for layer in body.layers),
        protect=protected,
        parameters=sum(p.numel() for p in model.parameters()),
        parameters_removed=parameters_removed(body, kept, kept_heads),
        details=details,
    )


class Planner:
    """What the steps of planning share: the model, its calibration, and scores that were computed already."""

    def __init__(
        self,
        model: nn.Module,
        body: Anatomy,
        chosen: Criterion,
        windows: Tensor | None,
        networks: Any,
        random_state: int,
        weights: Tensor | None = None,
    ) -> None:
        self.model, self.body, self.criterion, self.windows = model, body, chosen, windows
        self.generator = torch.Generator().manual_seed(random_state)
        self.random_state, self.weights = random_state, weights
        self.published: list[NDArray[np.float64]] | None = None
        self.masks = None if networks is None else layer_masks(networks, body)
        needs = {"metric", "taylor"} & chosen.needs
        gradients = {}
        if needs:
            assert windows is not None
            gradients = gradient_pass(
                model, body, windows, metric="metric" in needs, taylor="taylor" in needs, weights=weights
            )
        self.metric: list[Tensor] | None = gradients.get("metric")
        self.taylor: list[Tensor] | None = gradients.get("taylor")
        self.targets: NDArray[np.bool_] | None = None
        self._dense_scores: list[NDArray[np.float64]] | None = None

    # -- scores ------------------------------------------------------------------------------------------------------

    def score_by_rule(self, scans: Sequence[Any] | None, notes: list[str], rule: dict[str, Any]) -> dict[str, Any]:
        """Scores of the published rule, from scans that have its sites or from the calibration windows."""
        gated = all(layer.gated for layer in self.body.layers)
        sites = rule.pop("sites", None) or (("gate", "up") if gated else ("neuron",))
        if not gated and sites == ("neuron",):
            notes.append("this model has no gate: the published rule reads the neuron signal instead of gate and up")
        if not scans or any(s not in scan.sites for scan in scans for s in sites):
            if self.windows is None:
                raise InputError(f"method='published' needs scans with the sites {list(sites)}, or calibration texts")
            scans = signals_of_windows(self.model, self.body, self.windows, sites)
        options = {"n_groups": -(-len(scans) // GROUP_SIZE), "random_state": self.random_state, **rule}
        result = published_scores(scans, self.body.widths, sites=sites, **options)
        self.published = result.scores
        return result.details

    def score(self, site: Site | None, layer: int, *, heads: bool = False) -> NDArray[np.float64]:
        """Scores of one layer's neurons or key/value groups."""
        anatomy_ = self.body.layers[layer]
        output = anatomy_.out if heads else anatomy_.down
        assert output is not None

        def of_layer(values: Sequence[Any] | None) -> Tensor | None:
            return None if values is None or heads else torch.as_tensor(values[layer])

        evidence = Evidence(
            layer=anatomy_,
            output=output,
            weight=output.weight().detach().double() if site is None else site.weight,
            generator=self.generator,
            moments=None if site is None else site.all,
            metric=of_layer(self.metric),
            taylor=of_layer(self.taylor),
            published=of_layer(self.published),
        )
        scores = self.criterion.score(evidence).detach().cpu().numpy().astype(float)
        if self.targets is not None and not heads:  # what is to be forgotten goes first
            scores[self.targets[NeuronSpace(self.body.widths).layer_slice(layer)]] = scores.min() - 1.0
        if not np.isfinite(scores).all():
            raise InputError(f"{output.path}: unit {int(np.argmin(np.isfinite(scores)))} has no finite score")
        return scores

    def dense_scores(self) -> list[NDArray[np.float64]]:
        """Scores of all layers in the dense model; computed once."""
        if self._dense_scores is None:
            found: list[NDArray[np.float64]] = []
            if "moments" in self.criterion.needs:
                assert self.windows is not None

                def look(site: Site) -> None:
                    found.append(self.score(site, site.layer.index))

                walk(
                    self.model, self.body, self.windows, look, sequential=False, weights=self.weights, progress="score"
                )
            else:
                found = [self.score(None, i) for i in range(len(self.body.layers))]
            self._dense_scores = found
        return self._dense_scores

    # -- widths ------------------------------------------------------------------------------------------------------

    def allocate(self, allocation: str | Sequence[int], budget: Budget, details: dict[str, Any]) -> tuple[int, ...]:
        """Neurons that each layer keeps."""
        if not isinstance(allocation, str):
            widths = tuple(int(w) for w in allocation)
            if len(widths) != len(budget.widths) or any(not 1 <= w <= b for w, b in zip(widths, budget.widths)):
                raise InputError(f"allocation={list(widths)} must give each layer 1 to {list(budget.widths)} neurons")
            return widths
        if allocation == "uniform":
            return uniform(budget)
        if allocation in ("global", "clamped"):
            standardise = self.criterion.standardise
            return ranked(budget, self.dense_scores(), standardise=standardise, clamp=allocation == "clamped")
        losses = self.measure_sensitivity()
        details["sensitivity"] = {"levels": list(LEVELS), "loss_added": np.round(losses, 6).tolist()}
        best = from_losses(budget, losses)
        if allocation == "sensitivity":
            return best
        both = [
            ranked(budget, self.dense_scores(), standardise=self.criterion.standardise, clamp=c) for c in (False, True)
        ]
        middle = budget.fit((np.array(best) + np.array(both[0])) / 2)
        candidates = list(dict.fromkeys([best, *both, middle, uniform(budget)]))
        added = self.measure_widths(candidates)
        details["search"] = [{"widths": list(w), "loss_added": round(x, 6)} for w, x in zip(candidates, added)]
        return candidates[int(np.argmin(added))]

    def measure_sensitivity(self) -> NDArray[np.float64]:
        """Loss added when one layer alone loses each share of `LEVELS` and is refitted; ``(n_layers, levels)``.

        Fitted and measured on the training part of the calibration windows.
        """
        test = self._test_windows(held_out=False)
        base = mean_loss(self.model, test)
        losses = np.zeros((len(self.body.layers), len(LEVELS)))
        scores: list[NDArray[np.float64]] = []

        def look(site: Site) -> None:
            i = site.layer.index
            scores.append(self.score(site, i))
            with restored([site.layer]):
                for k, level in enumerate(LEVELS):
                    kept = _best(scores[i], max(1, round((1 - level) * site.output.units)))
                    write(site.output, self._fit_on_train(site, kept))
                    losses[i, k] = mean_loss(self.model, test) - base

        self._look("sensitivity", look)
        self._dense_scores = scores
        return losses

    def measure_widths(self, candidates: Sequence[tuple[int, ...]]) -> list[float]:
        """Loss added by each set of widths, all layers cut and refitted at once; measured on held-out windows."""
        scores, test = self.dense_scores(), self._test_windows(held_out=True)
        changes: dict[tuple[int, int], Change] = {}  # by layer and width

        def look(site: Site) -> None:
            i = site.layer.index
            for width in {c[i] for c in candidates}:
                change = self._fit_on_train(site, _best(scores[i], width))
                assert change.repair is not None
                change.repair.weight = change.repair.weight.to(site.output.weight().dtype)
                changes[i, width] = change

        self._look("search", look)
        base = mean_loss(self.model, test)
        added = []
        for widths in candidates:
            with restored(self.body.layers):
                for i, width in enumerate(widths):
                    write(self.body.layers[i].down, changes[i, width])
                added.append(mean_loss(self.model, test) - base)
        return added

    def _fit_on_train(self, site: Site, kept: NDArray[np.int64]) -> Change:
        columns = torch.from_numpy(kept)
        on_device = columns.to(site.output.weight().device)
        return Change(columns, least_squares(site.train, site.weight, on_device, ridge=SCAN_RIDGE))

    def _test_windows(self, *, held_out: bool) -> Tensor:
        """Windows to measure losses on: held-out ones, or training ones spread over the text.

        Sensitivities are measured on the latter: widths that minimise the noise of the very windows that then choose
        between allocations would always win.
        """
        assert self.windows is not None
        held, train = split_windows(self.windows)
        chosen = held if held_out else train
        count = max(1, LOSS_TOKENS // chosen.shape[1])
        return chosen[:: max(1, len(chosen) // count)][:count]

    def _look(self, what: str, step: Callable[[Site], None]) -> None:
        """Visit every layer of the dense model, changing none."""
        assert self.windows is not None
        walk(self.model, self.body, self.windows, step, sequential=False, weights=self.weights, progress=what)

    def head_budget(self, head_ratio: float) -> tuple[int, ...] | None:
        """Key/value groups that each layer keeps; None where heads are not touched."""
        if not head_ratio:
            return None
        if any(not layer.heads or layer.out is None for layer in self.body.layers):
            raise InputError(f"head_ratio={head_ratio}: the heads of {self.body.family} models cannot be cut")
        groups = [layer.out.units for layer in self.body.layers if layer.out is not None]
        return uniform(Budget.of(groups, head_ratio))

    # -- what stays --------------------------------------------------------------------------------------------------

    def choose(
        self, widths: Sequence[int], groups: Sequence[int] | None, *, sequential: bool
    ) -> tuple[Kept, Kept | None]:
        """The best units of each layer; sequentially, on the prefix as pruned and refitted so far."""
        kept: list[NDArray[np.int64]] = []
        heads: list[NDArray[np.int64]] = []
        if not sequential and groups is None:
            return tuple(self.pick(s, w, i) for i, (s, w) in enumerate(zip(self.dense_scores(), widths))), None
        if self.windows is None:
            raise InputError("head_ratio needs calibration texts")

        def step(site: Site, count: int, found: list[NDArray[np.int64]], of_heads: bool) -> Change | None:
            scores = self.score(site, site.layer.index, heads=of_heads)
            found.append(_best(scores, count) if of_heads else self.pick(scores, count, site.layer.index))
            last = site.layer is self.body.layers[-1] and not of_heads
            if not sequential or last or count == site.output.units:
                return None
            return fit(site, torch.from_numpy(found[-1]), "least-squares")

        with restored(self.body.layers, heads=groups is not None):
            walk(
                self.model,
                self.body,
                self.windows,
                lambda site: step(site, widths[site.layer.index], kept, False),
                heads=None if groups is None else (lambda site: step(site, groups[site.layer.index], heads, True)),
                sequential=sequential,
                weights=self.weights,
                progress="choose",
            )
        return tuple(kept), tuple(heads) if groups is not None else None

    def pick(self, scores: NDArray[np.float64], count: int, layer: int) -> NDArray[np.int64]:
        """The best units; with networks, such that each keeps some of its key neurons."""
        if "networks" not in self.criterion.needs or self.masks is None:
            return _best(scores, count)
        return covered(scores, count, self.masks[layer])

    def threshold(self, kept: Kept, protect: Sequence[int]) -> float:
        """The cut-off tau between what the published rule keeps and what it removes."""
        scores = self.dense_scores()
        cut = [
            np.delete(s, k).max() for i, (s, k) in enumerate(zip(scores, kept)) if i not in protect and len(k) < len(s)
        ]
        return float(max(cut)) if cut else 0.0


def _best(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int64)
