"""The work behind `plan_pruning`: scores, widths, and what stays; what does not depend on the ratio is done once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError, check_option, check_range
from llmbrain.architectures import anatomy
from llmbrain.evaluation.windows import fingerprint
from llmbrain.pruning.allocation import ALLOCATIONS, LEVELS, Budget, from_curves, from_losses, ranked, uniform
from llmbrain.pruning.api import fit
from llmbrain.pruning.calibration import check_enough, signals_of_windows
from llmbrain.pruning.compensation import least_squares
from llmbrain.pruning.criteria import Evidence, criterion
from llmbrain.pruning.losses import Objective
from llmbrain.pruning.network_terms import COVER, balanced_weights, covered, layer_masks, time_courses
from llmbrain.pruning.plan import Kept, PruningPlan, check_protect, parameters_removed, weights_fingerprint
from llmbrain.pruning.published import published_scores
from llmbrain.pruning.statistics import gradient_pass
from llmbrain.pruning.walk import Change, Site, restored, split_windows, walk, write
from llmbrain.space import NeuronSpace
from llmbrain.surgery import check_cuttable

GROUP_SIZE = 40  # texts in a group of the published rule
LOSS_TOKENS = 8192  # tokens on which a loss is measured, at most
SENSITIVITY_PASSES = 8  # forward passes over the calibration text that all sensitivities together may cost
SURE = 2.0  # standard errors of a gain on held-out windows
SCAN_RIDGE = 1e-3  # of the fits that sensitivities are measured with


class Planner:
    """What the steps of planning share: the model, its calibration, and what was computed already.

    Attributes
    ----------
    targets : bool array ``(n_neurons,)``, optional
        Neurons that go before any other.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        windows: Tensor | None = None,
        *,
        networks: Any = None,
        scans: Sequence[Any] | None = None,
        random_state: int = 0,
        weights: Tensor | None = None,
        token_balance: float = 0.0,
        rule: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.body, self.criterion, self.windows = model, anatomy(model), criterion(method), windows
        check_cuttable(self.body)
        check_range("token_balance", token_balance, 0, 1)
        needs = self.criterion.needs & {"moments", "metric", "taylor"}
        if needs and windows is None:
            raise InputError(f"method={method!r} needs calibration texts (or scans with tokens)")
        if needs and windows is not None:
            check_enough(windows, max(self.body.widths))
        self.notes: list[str] = []
        self.details: dict[str, Any] = {"notes": self.notes}
        self.generator = torch.Generator().manual_seed(random_state)
        self.random_state, self.weights = random_state, weights
        self.masks: list[NDArray[np.bool_]] | None = None
        if "networks" in self.criterion.needs:
            self._use_networks(networks, token_balance)
        self.published: list[NDArray[np.float64]] | None = None
        if "published" in self.criterion.needs:
            self._score_by_rule(scans, dict(rule or {}))
        gradients: dict[str, list[Tensor]] = {}
        if needs & {"metric", "taylor"}:
            assert windows is not None
            gradients = gradient_pass(
                model, self.body, windows, metric="metric" in needs, taylor="taylor" in needs, weights=self.weights
            )
        self.metric, self.taylor = gradients.get("metric"), gradients.get("taylor")
        self.targets: NDArray[np.bool_] | None = None
        self._dense_scores: list[NDArray[np.float64]] | None = None
        self._losses: NDArray[np.float64] | None = None

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
        details = {**self.details, "notes": list(self.notes)}
        protected = self._protected(protect, details["notes"])
        budget = Budget.of(self.body.widths, ratio, protected, multiple_of)
        if allocation is None:
            allocation = {"published": "global", "networks": "search"}.get(self.criterion.name, "uniform")
        sequential = self.windows is not None and (self.criterion.sequential if sequential is None else sequential)
        widths = self.allocate(allocation, budget, details, sequential=sequential)
        kept, kept_heads = self.choose(widths, self.head_budget(head_ratio), sequential=sequential)
        if self.published is not None:
            details["threshold"] = self.threshold(kept, protected)
        if self.windows is not None:
            details["calibration"] = {"hash": fingerprint(self.windows), "shape": list(self.windows.shape)}
        return PruningPlan(
            method=self.criterion.name,
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
            details=details,
        )

    def _protected(self, protect: Sequence[int] | None, notes: list[str]) -> tuple[int, ...]:
        n = len(self.body.layers)
        if protect is None and self.published is not None:
            protect = (0, 1, 2, n - 2, n - 1) if n > 5 else ()
            if n <= 5:
                notes.append(
                    f"the published rule keeps the first 3 and last 2 layers; with {n} layers none is protected"
                )
        return check_protect(protect, n)

    def _use_networks(self, networks: Any, token_balance: float) -> None:
        if networks is None:
            self.notes.append("no networks given: tokens count alike, nothing is covered")
            return
        self.masks = layer_masks(networks, self.body)
        if token_balance and self.weights is None and self.windows is not None:
            self.weights = balanced_weights(time_courses(self.model, self.body, self.windows, networks), token_balance)
        self.details["networks"] = {"n": len(networks.maps), "token_balance": token_balance, "cover": COVER}

    # -- scores ------------------------------------------------------------------------------------------------------

    def _score_by_rule(self, scans: Sequence[Any] | None, rule: dict[str, Any]) -> None:
        """Scores of the published rule, from scans that have its sites or from the calibration windows."""
        gated = all(layer.gated for layer in self.body.layers)
        sites = rule.pop("sites", None) or (("gate", "up") if gated else ("neuron",))
        if not gated and sites == ("neuron",):
            self.notes.append(
                "this model has no gate: the published rule reads the neuron signal instead of gate and up"
            )
        if not scans or any(s not in scan.sites for scan in scans for s in sites):
            if self.windows is None:
                raise InputError(f"method='published' needs scans with the sites {list(sites)}, or calibration texts")
            scans = signals_of_windows(self.model, self.body, self.windows, sites)
        options = {"n_groups": -(-len(scans) // GROUP_SIZE), "random_state": self.random_state, **rule}
        result = published_scores(scans, self.body.widths, sites=sites, **options)
        self.published, self.details["published"] = result.scores, result.details

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
                self._look("score", lambda site: found.append(self.score(site, site.layer.index)))
            else:
                found = [self.score(None, i) for i in range(len(self.body.layers))]
            self._dense_scores = found
        return self._dense_scores

    # -- widths ------------------------------------------------------------------------------------------------------

    def allocate(
        self, allocation: str | Sequence[int], budget: Budget, details: dict[str, Any], *, sequential: bool = True
    ) -> tuple[int, ...]:
        """Neurons that each layer keeps."""
        if not isinstance(allocation, str):
            widths = tuple(int(w) for w in allocation)
            if len(widths) != len(budget.widths) or any(not 1 <= w <= b for w, b in zip(widths, budget.widths)):
                raise InputError(f"allocation={list(widths)} must give each layer 1 to {list(budget.widths)} neurons")
            return widths
        check_option("allocation", allocation, ALLOCATIONS)
        if allocation in ("sensitivity", "search") and self.windows is None:
            raise InputError(f"allocation={allocation!r} needs calibration texts (or scans with tokens)")
        if allocation == "uniform":
            return uniform(budget)
        if allocation in ("global", "clamped"):
            return self._ranked(budget, clamp=allocation == "clamped")
        losses = self.sensitivity()
        details["sensitivity"] = {"levels": list(LEVELS), "loss_added": np.round(losses, 6).tolist()}
        if allocation == "sensitivity":
            return from_losses(budget, losses)
        best = from_curves(budget, losses)
        both = [self._ranked(budget, clamp=c) for c in (False, True)]
        even = uniform(budget)
        middles = [budget.fit((np.array(best) + np.array(other)) / 2) for other in (both[0], even)]
        candidates = list(dict.fromkeys([best, *middles, *both, even]))
        losses_ = np.array([self.measure(c, sequential=sequential) for c in candidates])
        gain = losses_[0] - losses_  # by window; the first stays unless another is surely better
        sure = gain.mean(1) > SURE * gain.std(1) / np.sqrt(gain.shape[1])
        mean = np.where(sure, losses_.mean(1), np.inf)
        mean[0] = losses_[0].mean()
        details["search"] = [
            {"widths": list(w), "loss": round(float(x), 6), "chosen": i == int(np.argmin(mean))}
            for i, (w, x) in enumerate(zip(candidates, losses_.mean(1)))
        ]
        return candidates[int(np.argmin(mean))]

    def _ranked(self, budget: Budget, *, clamp: bool) -> tuple[int, ...]:
        return ranked(budget, self.dense_scores(), standardise=self.criterion.standardise, clamp=clamp)

    def sensitivity(self) -> NDArray[np.float64]:
        """Loss added when one layer alone loses each share of `LEVELS` and is refitted; ``(n_layers, levels)``.

        Fitted and measured on the training part of the calibration windows: widths that minimise the noise of the very
        windows that then choose between allocations would always win. Computed once.
        """
        if self._losses is not None:
            return self._losses
        objective = self._objective(held_out=False)
        base = objective.mean()
        losses = np.zeros((len(self.body.layers), len(LEVELS)))
        scores: list[NDArray[np.float64]] = []

        def look(site: Site) -> None:
            i = site.layer.index
            scores.append(self.score(site, i))
            with restored([site.layer]):
                for k, level in enumerate(LEVELS):
                    columns = torch.from_numpy(best_units(scores[i], max(1, round((1 - level) * site.output.units))))
                    on_device = columns.to(site.output.weight().device)
                    write(
                        site.output,
                        Change(columns, least_squares(site.train, site.weight, on_device, ridge=SCAN_RIDGE)),
                    )
                    losses[i, k] = objective.mean() - base

        self._look("sensitivity", look)
        self._dense_scores, self._losses = scores, losses
        return losses

    def measure(self, widths: Sequence[int], *, sequential: bool = True) -> NDArray[np.float64]:
        """Loss on each held-out window after a whole cut to these widths, chosen and refitted on the others."""
        objective = self._objective(held_out=True)
        scores = None if sequential else self.dense_scores()

        def step(site: Site) -> Change | None:
            i, count = site.layer.index, widths[site.layer.index]
            if count == site.output.units and not sequential:
                return None
            kept = self.pick(self.score(site, i) if scores is None else scores[i], count, i)
            return fit(site, torch.from_numpy(kept), "least-squares", on=site.train)

        with restored(self.body.layers):
            assert self.windows is not None
            walk(self.model, self.body, self.windows, step, sequential=True, weights=self.weights, progress="search")
            return objective.by_window()

    def _objective(self, *, held_out: bool) -> Objective:
        """The loss on held-out windows or on training ones, spread over the text."""
        assert self.windows is not None
        tokens = LOSS_TOKENS
        if not held_out:
            trials = len(self.body.layers) * len(LEVELS)
            tokens = min(tokens, SENSITIVITY_PASSES * self.windows.numel() // trials)
        parts = [split_windows(x)[0 if held_out else 1] for x in (self.windows, self.weights) if x is not None]
        count = max(1, tokens // parts[0].shape[1])
        chosen = [p[:: max(1, len(p) // count)][:count] for p in parts]
        return Objective(self.model, *chosen)

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
            found.append(best_units(scores, count) if of_heads else self.pick(scores, count, site.layer.index))
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
        if self.masks is None:
            return best_units(scores, count)
        return covered(scores, count, self.masks[layer])

    def threshold(self, kept: Kept, protect: Sequence[int]) -> float:
        """The cut-off tau between what the published rule keeps and what it removes."""
        scores = self.dense_scores()
        cut = [
            np.delete(s, k).max() for i, (s, k) in enumerate(zip(scores, kept)) if i not in protect and len(k) < len(s)
        ]
        return float(max(cut)) if cut else 0.0


def best_units(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Ascending indices of the `count` best."""
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int64)
