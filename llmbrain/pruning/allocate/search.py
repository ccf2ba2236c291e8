"""What a cut would cost, measured: of one layer alone, and of a whole allocation; and the allocations made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmbrain._validation import MANY, InputError, check_option, check_range
from llmbrain.anatomy.families import LayerAnatomy
from llmbrain.anatomy.surgery import Change, restored, write
from llmbrain.anatomy.units import NEURONS, Units
from llmbrain.pruning.allocate.budget import Budget
from llmbrain.pruning.allocate.losses import LEVELS, from_curves, from_losses
from llmbrain.pruning.allocate.shares import by_density, ranked, uniform
from llmbrain.pruning.calibrate.losses import Objective
from llmbrain.pruning.calibrate.steps import Found, Measured
from llmbrain.pruning.calibrate.stream import split_windows
from llmbrain.pruning.criteria.base import best_units
from llmbrain.pruning.criteria.networks import check_space
from llmbrain.pruning.criteria.scorer import Scorer
from llmbrain.pruning.repair.fit import fit
from llmbrain.pruning.repair.least_squares import least_squares

ALLOCATIONS = ("uniform", "global", "clamped", "networks", "sensitivity", "search")
MEASURED = ("sensitivity", "search")  # those that run the model
PASSES = 24  # forward passes over the calibration text that a search may cost
OF_SENSITIVITY = 1 / 3  # share of them for the sensitivities it starts from
OF_CANDIDATE = 2.25  # passes that one allocation takes: two of the walk, one of the held-out windows
LOSS_TOKENS = 8192  # tokens on which a loss is measured, at most
ENOUGH = 512  # tokens of one trial; with fewer, fewer levels are tried, on more tokens each
SHORTEST = 64  # tokens of the beginning of a window that a trial reads, at least
SURE = 2.0  # standard errors of a gain on held-out windows
SCAN_RIDGE = 1e-3  # of the fits that sensitivities are measured with


class Allocator:
    """Allocations of one scorer's units.

    Parameters
    ----------
    scorer : Scorer
    passes : float
        Forward passes over the calibration text that ``"sensitivity"`` and ``"search"`` may cost together.

    Attributes
    ----------
    kinds : int
        How many kinds of units share the passes.
    """

    def __init__(self, scorer: Scorer, passes: float = PASSES) -> None:
        check_range("passes", passes, 0, MANY, open_low=True)
        self.scorer, self.passes, self.kinds = scorer, passes, 1
        self._losses: dict[Units, NDArray[np.float64]] = {}
        self._levels: tuple[float, ...] = LEVELS

    def check(self, allocation: str) -> None:
        """Refuse an allocation that is not known, or that would measure without text."""
        check_option("allocation", allocation, ALLOCATIONS)
        if allocation in MEASURED and self.scorer.material.windows is None:
            raise InputError(f"allocation={allocation!r} needs calibration texts (or scans with tokens)")
        if allocation == "networks" and self.scorer.material.networks is None:
            raise InputError("allocation='networks' needs networks: give plan_pruning the networks of this model")

    def spread(self, allocation: str, budget: Budget, units: Units = NEURONS) -> tuple[int, ...]:
        """Units that each layer keeps, with no whole model measured."""
        self.check(allocation)
        if allocation == "uniform":
            return uniform(budget)
        if allocation == "networks":
            networks, body = self.scorer.material.networks, self.scorer.material.body
            assert networks is not None
            space = check_space(networks, body)
            return by_density(budget, networks.maps, space) if units is NEURONS else uniform(budget)
        if allocation in ("global", "clamped"):
            standardize = self.scorer.criterion.standardize
            scores = self.scorer.dense_scores(units)
            return ranked(budget, scores, standardize=standardize, clamp=allocation == "clamped")
        losses = self.sensitivity(units)
        widths = from_losses if allocation == "sensitivity" else from_curves
        return widths(budget, losses, self._levels)

    def facts(self, allocation: str, units: Units) -> dict[str, Any]:
        """The sensitivities that an allocation came from."""
        if allocation not in MEASURED or units not in self._losses:
            return {}
        name = "sensitivity" if units is NEURONS else f"{units.name.removesuffix('s')}_sensitivity"
        return {name: {"levels": list(self._levels), "loss_added": np.round(self._losses[units], 6).tolist()}}

    def search(
        self,
        best: tuple[int, ...],
        budget: Budget,
        others: Mapping[Units, Sequence[int]],
        *,
        sequential: bool,
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        """`best`, unless another allocation is surely better on held-out windows, within the budget of passes.

        Parameters
        ----------
        others : mapping
            How many units of other kinds each layer keeps.

        Returns
        -------
        widths, facts
            What the plan should record of it.
        """
        ends = [self.spread(name, budget) for name in ("global", "clamped", "uniform")]
        middles = [budget.fit((np.array(best) + np.array(o)) / 2) for o in (ends[0], ends[2])]
        candidates = list(dict.fromkeys([best, *middles, *ends]))
        affordable = int(self.passes * (1 - OF_SENSITIVITY) / OF_CANDIDATE)
        candidates = candidates[: max(1, affordable)]
        if len(candidates) == 1:
            return best, {}
        losses = np.array([self.measure({**others, NEURONS: c}, sequential=sequential) for c in candidates])
        gain = losses[0] - losses  # by window
        sure = gain.mean(1) > SURE * gain.std(1) / np.sqrt(gain.shape[1])
        mean = np.where(sure, losses.mean(1), np.inf)
        mean[0] = losses[0].mean()
        chosen = int(np.argmin(mean))
        tried = [
            {"widths": list(w), "loss": round(float(x), 6), "chosen": i == chosen}
            for i, (w, x) in enumerate(zip(candidates, losses.mean(1)))
        ]
        return candidates[chosen], {"search": tried}

    def sensitivity(self, units: Units = NEURONS) -> NDArray[np.float64]:
        """Loss added when one layer alone loses each share of `LEVELS` and is refitted; ``(n_layers, levels)``.

        Fitted and measured on the training part of the calibration windows: widths that minimize the noise of the very
        windows that then choose between allocations would always win. Where the passes allow too few tokens for every
        trial (deep models), fewer levels are tried, on the beginnings of windows. Computed once.
        """
        if units in self._losses:
            return self._losses[units]
        n_layers, windows = len(self.scorer.material.body.layers), self.scorer.material.windows
        assert windows is not None
        of_layer = OF_SENSITIVITY * self.passes * windows.numel() / (n_layers * self.kinds)
        plans = (LEVELS, LEVELS[::2], LEVELS[2::4])
        self._levels = next((levels for levels in plans if of_layer / len(levels) >= ENOUGH), plans[-1])
        objective = self.objective(held_out=False, tokens=int(of_layer / len(self._levels)))
        base = objective.mean()
        losses = np.zeros((n_layers, len(self._levels)))
        scores: list[NDArray[np.float64]] = [np.zeros(0) for _ in losses]

        def look(measured: Measured) -> Found:
            i, output = measured.layer.index, measured.output
            own, row = self.scorer.score(measured, i, units), np.zeros(len(self._levels))
            known: dict[int, float] = {output.units: 0.0}  # few heads: several levels are the same cut
            with restored([measured.layer], [units]):
                for k, level in enumerate(self._levels):
                    count = max(1, round((1 - level) * output.units))
                    if count not in known:
                        kept = torch.from_numpy(best_units(own, count))
                        columns = (output.rows(kept) - output.start).to(measured.weight.device)
                        refit = least_squares(measured.train, measured.weight, columns, ridge=SCAN_RIDGE)
                        write(output, Change(kept, refit))
                        known[count] = objective.mean() - base
                    row[k] = known[count]
            return Found(arrays={"scores": own, "losses": row})

        def take(layer: LayerAnatomy, found: Found) -> None:
            scores[layer.index] = found.arrays["scores"]
            losses[layer.index] = found.arrays["losses"]

        self.scorer.look("sensitivity", self.scorer.step(look, take), units)
        self.scorer.remember(scores, units)
        self._losses[units] = losses
        return losses

    def measure(self, counts: Mapping[Units, Sequence[int]], *, sequential: bool = True) -> NDArray[np.float64]:
        """Loss on each held-out window after a whole cut to these sizes, chosen and refitted on the others."""
        objective = self.objective(held_out=True)

        def step(measured: Measured, kept: NDArray[np.int64]) -> Change | None:
            if len(kept) == measured.output.units and not sequential:
                return None
            return fit(measured, torch.from_numpy(kept), "least-squares", on=measured.train)

        with restored(self.scorer.material.body.layers, list(counts)):
            self.scorer.cut("search", step, counts, sequential=sequential)
            return objective.by_window()

    def objective(self, *, held_out: bool, tokens: int = LOSS_TOKENS) -> Objective:
        """The loss on about so many tokens of held-out windows or of training ones, spread over the text."""
        given, tokens = self.scorer.material, min(tokens, LOSS_TOKENS)
        assert given.windows is not None
        parts = [split_windows(x)[0 if held_out else 1] for x in (given.windows, given.weights) if x is not None]
        length = parts[0].shape[1]
        if tokens < length:  # of several windows the beginnings rather than the whole of one
            length = min(length, max(SHORTEST, tokens // 4))
        count = max(1, tokens // length)
        chosen = [p[:: max(1, len(p) // count)][:count, :length] for p in parts]
        return Objective(given.model, *chosen)
