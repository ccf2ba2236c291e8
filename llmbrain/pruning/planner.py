"""From scores to a plan: how many units each layer keeps, and which; what ratios share is done once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError, check_option
from llmbrain.hooks.text import digest
from llmbrain.pruning.allocate.widths import ALLOCATIONS, LEVELS, Budget, from_curves, from_losses, ranked, uniform
from llmbrain.pruning.calibrate.losses import Objective
from llmbrain.pruning.calibrate.walk import Change, Site, Step, restored, split_windows, walk, write
from llmbrain.pruning.criteria.scorer import Scorer, best_units
from llmbrain.pruning.plan import Kept, PruningPlan, check_protect, parameters_removed, weights_fingerprint
from llmbrain.pruning.prune import fit
from llmbrain.pruning.repair.least_squares import least_squares

PASSES = 24  # forward passes over the calibration text that a search may cost
OF_SENSITIVITY = 1 / 3  # share of them for the sensitivities it starts from
OF_CANDIDATE = 2.25  # passes that one allocation takes: two of the walk, one of the held-out windows
LOSS_TOKENS = 8192  # tokens on which a loss is measured, at most
SURE = 2.0  # standard errors of a gain on held-out windows
SCAN_RIDGE = 1e-3  # of the fits that sensitivities are measured with


class Planner:
    """Plans of one model, method and calibration, at any ratio.

    Parameters
    ----------
    model, method, windows, **options
        As `Scorer` takes them.
    passes : float
        Forward passes over the calibration text that ``"sensitivity"`` and ``"search"`` may cost together.
    """

    def __init__(
        self, model: nn.Module, method: str, windows: Tensor | None = None, *, passes: float = PASSES, **options: Any
    ) -> None:
        if not passes > 0:
            raise InputError(f"passes={passes!r} must be above 0: forward passes over the calibration text")
        self.scorer = Scorer(model, method, windows, **options)
        self.model, self.body, self.windows, self.passes = model, self.scorer.body, windows, passes
        self._losses: dict[bool, NDArray[np.float64]] = {}
        self._kinds = 1  # of units that share the passes: neurons, or neurons and heads

    @property
    def weights(self) -> Tensor | None:
        """How much each calibration token counts."""
        return self.scorer.weights

    def plan(
        self,
        ratio: float,
        *,
        allocation: str | Sequence[int] | None = None,
        protect: Sequence[int] | None = None,
        multiple_of: int = 1,
        sequential: bool | None = None,
        head_ratio: float = 0.0,
    ) -> PruningPlan:
        """The plan of one ratio; parameters as in `plan_pruning`."""
        criterion = self.scorer.criterion
        notes: list[str] = []
        protected = self._protected(protect, notes)
        budget = Budget.of(self.body.widths, ratio, protected, multiple_of)
        head_budget = None
        if head_ratio:
            head_budget = Budget.of(groups_of(self.body, head_ratio), head_ratio, protected, name="head_ratio")
            self.scorer.learn(heads=True)  # while the model is dense
        self._kinds = 1 if head_budget is None else 2
        if allocation is None:
            allocation = {"published": "global", "networks": "search"}.get(criterion.name, "uniform")
        sequential = self.windows is not None and (criterion.sequential if sequential is None else sequential)
        details: dict[str, Any] = {}
        groups = None if head_budget is None else self.allocate_heads(allocation, head_budget, details)
        widths = self.allocate(allocation, budget, details, groups=groups, sequential=sequential)
        kept, kept_heads = self.choose(widths, groups, sequential=sequential)
        if criterion.name == "published":
            details["threshold"] = self._threshold(kept, protected)
        if self.windows is not None:
            details["calibration"] = {"hash": digest(self.windows), "shape": list(self.windows.shape)}
        if self.scorer.balanced and self.weights is not None:
            details["token_weights"] = np.round(self.weights.numpy().astype(float), 2).tolist()
        return PruningPlan(
            method=criterion.name,
            allocation=allocation if isinstance(allocation, str) else "given",
            ratio=float(ratio),
            kept=kept,
            widths_before=self.body.widths,
            fingerprint=weights_fingerprint(self.body),
            kept_heads=kept_heads,
            groups_before=tuple(layer.out.units if layer.out is not None else 0 for layer in self.body.layers),
            protect=protected,
            parameters=sum(p.numel() for p in self.model.parameters()),
            parameters_removed=parameters_removed(self.body, kept, kept_heads),
            details={**self.scorer.details, **details, "notes": [*self.scorer.notes, *notes]},
        )

    def _protected(self, protect: Sequence[int] | None, notes: list[str]) -> tuple[int, ...]:
        n = len(self.body.layers)
        if protect is None and self.scorer.criterion.name == "published":
            protect = (0, 1, 2, n - 2, n - 1) if n > 5 else ()
            if n <= 5:
                notes.append(
                    f"the published rule keeps the first 3 and last 2 layers; with {n} layers none is protected"
                )
        return check_protect(protect, n)

    # -- how many ----------------------------------------------------------------------------------------------------

    def allocate(
        self,
        allocation: str | Sequence[int],
        budget: Budget,
        details: dict[str, Any],
        *,
        groups: Sequence[int] | None = None,
        sequential: bool = True,
    ) -> tuple[int, ...]:
        """Neurons that each layer keeps, where it keeps so many `groups` of heads."""
        if not isinstance(allocation, str):
            widths = tuple(int(w) for w in allocation)
            if len(widths) != len(budget.widths) or any(not 1 <= w <= b for w, b in zip(widths, budget.widths)):
                raise InputError(f"allocation={list(widths)} must give each layer 1 to {list(budget.widths)} neurons")
            return widths
        best = self._spread(allocation, budget)
        if False in self._losses and allocation in ("sensitivity", "search"):
            details["sensitivity"] = _sensitivity_record(self._losses[False])
        return self._search(best, budget, details, groups, sequential) if allocation == "search" else best

    def allocate_heads(
        self, allocation: str | Sequence[int], budget: Budget, details: dict[str, Any]
    ) -> tuple[int, ...]:
        """Key/value groups that each layer keeps; the same share everywhere where only widths were given."""
        groups = self._spread(allocation if isinstance(allocation, str) else "uniform", budget, heads=True)
        if True in self._losses and allocation in ("sensitivity", "search"):
            details["head_sensitivity"] = _sensitivity_record(self._losses[True])
        return groups

    def _spread(self, allocation: str, budget: Budget, *, heads: bool = False) -> tuple[int, ...]:
        """Units by an allocation, with no whole model measured."""
        check_option("allocation", allocation, ALLOCATIONS)
        if allocation in ("sensitivity", "search") and self.windows is None:
            raise InputError(f"allocation={allocation!r} needs calibration texts (or scans with tokens)")
        if allocation == "uniform":
            return uniform(budget)
        if allocation in ("global", "clamped"):
            scores = self.scorer.dense_scores(heads=heads)
            standardise = self.scorer.criterion.standardise
            return ranked(budget, scores, standardise=standardise, clamp=allocation == "clamped")
        losses = self.sensitivity(heads=heads)
        return from_losses(budget, losses) if allocation == "sensitivity" else from_curves(budget, losses)

    def _search(
        self,
        best: tuple[int, ...],
        budget: Budget,
        details: dict[str, Any],
        groups: Sequence[int] | None,
        sequential: bool,
    ) -> tuple[int, ...]:
        """`best`, unless another allocation is surely better on held-out windows, within the budget of passes."""
        others = [self._spread(name, budget) for name in ("global", "clamped", "uniform")]
        middles = [budget.fit((np.array(best) + np.array(o)) / 2) for o in (others[0], others[2])]
        candidates = list(dict.fromkeys([best, *middles, *others]))
        affordable = int(self.passes * (1 - OF_SENSITIVITY) / OF_CANDIDATE)
        candidates = candidates[: max(1, affordable)]
        if len(candidates) == 1:
            return best
        losses = np.array([self.measure(c, groups, sequential=sequential) for c in candidates])
        gain = losses[0] - losses  # by window
        sure = gain.mean(1) > SURE * gain.std(1) / np.sqrt(gain.shape[1])
        mean = np.where(sure, losses.mean(1), np.inf)
        mean[0] = losses[0].mean()
        chosen = int(np.argmin(mean))
        details["search"] = [
            {"widths": list(w), "loss": round(float(x), 6), "chosen": i == chosen}
            for i, (w, x) in enumerate(zip(candidates, losses.mean(1)))
        ]
        return candidates[chosen]

    def sensitivity(self, *, heads: bool = False) -> NDArray[np.float64]:
        """Loss added when one layer alone loses each share of `LEVELS` and is refitted; ``(n_layers, levels)``.

        Fitted and measured on the training part of the calibration windows: widths that minimise the noise of the very
        windows that then choose between allocations would always win. Computed once.
        """
        if heads in self._losses:
            return self._losses[heads]
        objective = self._objective(held_out=False)
        base = objective.mean()
        losses = np.zeros((len(self.body.layers), len(LEVELS)))
        scores: list[NDArray[np.float64]] = []

        def look(site: Site) -> None:
            i, units = site.layer.index, site.output.units
            scores.append(self.scorer.score(site, i, heads=heads))
            measured: dict[int, float] = {units: 0.0}  # few heads: several levels are the same cut
            with restored([site.layer], heads=heads):
                for k, level in enumerate(LEVELS):
                    count = max(1, round((1 - level) * units))
                    if count not in measured:
                        kept = torch.from_numpy(best_units(scores[i], count))
                        columns = (site.output.rows(kept) - site.output.start).to(site.weight.device)
                        refit = least_squares(site.train, site.weight, columns, ridge=SCAN_RIDGE)
                        write(site.output, Change(kept, refit))
                        measured[count] = objective.mean() - base
                    losses[i, k] = measured[count]

        self.scorer.look("sensitivity", look, heads)
        self.scorer.remember(scores, heads=heads)
        self._losses[heads] = losses
        return losses

    def measure(
        self, widths: Sequence[int], groups: Sequence[int] | None = None, *, sequential: bool = True
    ) -> NDArray[np.float64]:
        """Loss on each held-out window after a whole cut to these sizes, chosen and refitted on the others."""
        objective = self._objective(held_out=True)

        def step(site: Site, kept: NDArray[np.int64]) -> Change | None:
            if len(kept) == site.output.units and not sequential:
                return None
            return fit(site, torch.from_numpy(kept), "least-squares", on=site.train)

        with restored(self.body.layers, heads=groups is not None):
            self._cut("search", step, widths, groups, sequential=sequential)
            return objective.by_window()

    def _objective(self, *, held_out: bool) -> Objective:
        """The loss on held-out windows or on training ones, spread over the text."""
        assert self.windows is not None
        tokens = LOSS_TOKENS
        if not held_out:
            trials = len(self.body.layers) * len(LEVELS) * self._kinds
            tokens = min(tokens, int(OF_SENSITIVITY * self.passes * self.windows.numel() / trials))
        parts = [split_windows(x)[0 if held_out else 1] for x in (self.windows, self.weights) if x is not None]
        count = max(1, tokens // parts[0].shape[1])
        chosen = [p[:: max(1, len(p) // count)][:count] for p in parts]
        return Objective(self.model, *chosen)

    # -- which -------------------------------------------------------------------------------------------------------

    def choose(
        self, widths: Sequence[int], groups: Sequence[int] | None, *, sequential: bool
    ) -> tuple[Kept, Kept | None]:
        """The best units of each layer; sequentially, on the prefix as pruned and refitted so far."""
        if not sequential:
            neurons = self._best(widths)
            return neurons, None if groups is None else self._best(groups, heads=True)
        kept: list[NDArray[np.int64]] = []
        heads: list[NDArray[np.int64]] = []

        def step(site: Site, chosen: NDArray[np.int64]) -> Change | None:
            of_heads = site.output is site.layer.out
            (heads if of_heads else kept).append(chosen)
            last = site.layer is self.body.layers[-1] and not of_heads
            if last or len(chosen) == site.output.units:
                return None
            return fit(site, torch.from_numpy(chosen), "least-squares")

        with restored(self.body.layers, heads=groups is not None):
            self._cut("choose", step, widths, groups, sequential=True)
        return tuple(kept), None if groups is None else tuple(heads)

    def _best(self, counts: Sequence[int], *, heads: bool = False) -> Kept:
        """The best units of each layer in the dense model."""
        scores = self.scorer.dense_scores(heads=heads)
        return tuple(self.scorer.pick(s, n, i, heads=heads) for i, (s, n) in enumerate(zip(scores, counts)))

    def _cut(
        self,
        what: str,
        then: Callable[[Site, NDArray[np.int64]], Change | None],
        widths: Sequence[int],
        groups: Sequence[int] | None,
        *,
        sequential: bool,
    ) -> None:
        """Walk through the layers, choose the best units of each, and do `then` with ``(site, chosen)``."""
        assert self.windows is not None
        known: dict[bool, Kept] = {}
        if not sequential:
            known[False] = self._best(widths)
            known[True] = () if groups is None else self._best(groups, heads=True)

        def step(counts: Sequence[int], heads: bool) -> Step:
            def at(site: Site) -> Change | None:
                i = site.layer.index
                if known:
                    return then(site, known[heads][i])
                return then(site, self.scorer.pick(self.scorer.score(site, i, heads=heads), counts[i], i, heads=heads))

            return at

        walk(
            self.model, self.body, self.windows, step(widths, False),
            heads=None if groups is None else step(groups, True), sequential=True, weights=self.weights, progress=what,
        )  # fmt: skip

    def _threshold(self, kept: Kept, protect: Sequence[int]) -> float:
        """The cut-off tau between what the published rule keeps and what it removes."""
        scores = self.scorer.dense_scores()
        cut = [
            np.delete(s, k).max() for i, (s, k) in enumerate(zip(scores, kept)) if i not in protect and len(k) < len(s)
        ]
        return float(max(cut)) if cut else 0.0


def groups_of(body: Any, head_ratio: float) -> list[int]:
    """Key/value groups of each layer; heads that can not be cut are an `InputError`."""
    if any(not layer.heads or layer.out is None for layer in body.layers):
        raise InputError(f"head_ratio={head_ratio}: the heads of {body.family} models cannot be cut")
    return [layer.out.units for layer in body.layers]


def _sensitivity_record(losses: NDArray[np.float64]) -> dict[str, Any]:
    return {"levels": list(LEVELS), "loss_added": np.round(losses, 6).tolist()}
