"""Prune neurons inside experts: each routed expert of a layer keeps as many, shared experts are ordinary MLPs.

Every expert is scored as an MLP of its own, on the tokens that call it, each weighted with the square of its gate. The
criteria are those of dense models that look at one MLP at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError, check_range, seed_of
from llmbrain.anatomy.expert_parts import Part, check_neurons, parts_of
from llmbrain.anatomy.experts import ExpertAnatomy, ExpertLayer, expert_anatomy
from llmbrain.anatomy.layers import Anatomy
from llmbrain.anatomy.offload import check_in_memory
from llmbrain.anatomy.surgery import Change
from llmbrain.anatomy.units import NEURONS
from llmbrain.hooks.change import refuse_changed
from llmbrain.hooks.text import digest
from llmbrain.pruning.allocate.budget import check_multiple
from llmbrain.pruning.calibrate.gradients import gradient_pass
from llmbrain.pruning.calibrate.mixture import MeasuredPart, walk_mixture
from llmbrain.pruning.calibrate.moments import Uncentred
from llmbrain.pruning.calibrate.windows import check_weights
from llmbrain.pruning.criteria import CRITERIA, Criterion, Evidence, criterion
from llmbrain.pruning.experts import weights_digest
from llmbrain.pruning.plan import PruningPlan, check_protect
from llmbrain.pruning.repair.fit import fit
from llmbrain.pruning.repair.undo import down_projections, unchanged
from llmbrain.pruning.verify import check_reads

ALLOCATIONS = ("uniform", "global")
ALIGNED = 8  # grouped_mm of torch wants rows of 16 bytes: 8 numbers of 16 bits
FEW = 1.0  # tokens a neuron under which an expert's calls are few


def methods() -> list[str]:
    """Criteria that score one MLP at a time."""
    return sorted(name for name, of in CRITERIA.items() if _alone(of))


def _alone(of: type[Criterion]) -> bool:
    plain = of.prepare is Criterion.prepare and of.weigh is Criterion.weigh and not of.blocks
    return plain and of.needs <= {"activations", "gradients"}


@dataclass
class Request:
    """What is asked of a plan.

    Attributes
    ----------
    ratio : float
    method : str
    windows, weights : tensor, optional
        Calibration text, and how much each of its tokens counts.
    allocation : str, optional
    protect : sequence of int, optional
    multiple_of : int
    sequential : bool, optional
    random_state : int, optional
    """

    ratio: float
    method: str
    windows: Tensor | None = None
    weights: Tensor | None = None
    allocation: str | None = None
    protect: Sequence[int] | None = None
    multiple_of: int = 1
    sequential: bool | None = None
    random_state: int | None = 0
    notes: list[str] = field(default_factory=list)


def plan_expert_neurons(model: nn.Module, asked: Request) -> PruningPlan:
    """Choose which neurons of a mixture of experts go; nothing is cut yet.

    Raises
    ------
    InputError
        If the ratio is impossible, the method scores no neurons inside experts, or an expert that it must measure is
        never called in the calibration text.
    """
    criterion(asked.method)
    if asked.method not in methods():
        raise InputError(
            f"method={asked.method!r} does not score neurons inside experts: allowed are "
            f"{', '.join(map(repr, methods()))} (whole experts are removed with expert_ratio)"
        )
    refuse_changed(model, "plan_pruning")
    check_in_memory(model, "plan_pruning")
    check_range("ratio", asked.ratio, 0, 1, open_low=True, open_high=True)
    check_multiple(asked.multiple_of)
    body = expert_anatomy(model)
    check_neurons(body)
    if asked.allocation not in (None, *ALLOCATIONS):
        raise InputError(
            f"allocation={asked.allocation!r}: neurons inside experts are spread over layers by 'uniform' (the same "
            "share everywhere) or 'global' (all layers ranked together)"
        )
    planner = _Planner(model, body, asked)
    protected = check_protect(asked.protect, len(body.layers))
    uniform = (asked.allocation or "uniform") == "uniform"
    counts = planner.uniform(protected) if uniform else planner.ranked(protected)
    kept = planner.choose(counts)
    before = body.widths
    removed = sum(
        (p.width - count) * NEURONS.parameters(p.mlp) for layer in body.layers for p, count in planner.of(layer, counts)
    )
    details: dict[str, object] = {"notes": asked.notes}
    if asked.windows is not None:
        details["calibration"] = {"hash": digest(asked.windows), "shape": list(asked.windows.shape)}
        details["calls"] = {str(i): calls for i, calls in planner.calls.items()}
    return PruningPlan(
        method=asked.method, allocation="uniform" if uniform else "global", ratio=float(asked.ratio), kept=kept,
        widths_before=before, digest=weights_digest(body), protect=protected,
        parameters=sum(p.numel() for p in model.parameters()), parameters_removed=removed, details=details,
        experts_before=tuple(layer.expert_widths for layer in body.layers),
    )  # fmt: skip


Counts = dict[tuple[int, bool], int]
"""How many neurons a layer's routed experts (True) or shared ones (False) keep, each."""


class _Planner:
    """Scores, widths and choices of one request."""

    def __init__(self, model: nn.Module, body: ExpertAnatomy, asked: Request) -> None:
        self.model, self.body, self.asked = model, body, asked
        self.criterion = criterion(asked.method)()
        self.generator = torch.Generator().manual_seed(seed_of(asked.random_state))
        self.calls: dict[int, list[int]] = {}
        self.metric: dict[tuple[int, bool], Tensor] = {}
        self.groups = {
            (layer.index, routed): [p for p in parts_of(layer) if (p.routed is not None) == routed]
            for layer in body.layers
            for routed in (False, True)
        }
        self.groups = {key: parts for key, parts in self.groups.items() if parts}
        self._dense: list[list[NDArray[np.float64]]] = []
        if self.criterion.needs:
            if asked.windows is None:
                raise InputError(f"method={asked.method!r} needs calibration texts (and their tokenizer)")
            check_weights(asked.weights, asked.windows)
            check_reads(model, asked.windows)
        if "gradients" in self.criterion.needs:
            assert asked.windows is not None
            places = [self._output(key) for key in self.groups]
            found = gradient_pass(
                model, Anatomy(body.family, []), asked.windows, weights=asked.weights, places=places
            )  # fmt: skip
            self.metric = dict(zip(self.groups, found["metric"]))

    def _output(self, key: tuple[int, bool]) -> nn.Module:
        """What gives the output of a layer's routed or shared experts."""
        layer, routed = self.body.layers[key[0]], key[1]
        if routed:
            assert layer.routed is not None
            if not layer.routed.gate_first:
                return layer.routed.module
        # Both are added up, so their gradients are the same; experts whose gate comes first give one row an expert.
        return layer.shared[0].down.module

    def of(self, layer: ExpertLayer, counts: Counts) -> list[tuple[Part, int]]:
        """Every part of a layer, and how many neurons it keeps."""
        return [(p, counts[layer.index, p.routed is not None]) for p in parts_of(layer)]

    # -- widths ------------------------------------------------------------------------------------------------------

    def uniform(self, protected: Sequence[int]) -> Counts:
        """The same share of every expert; a shared one of n times the width of a routed one stays so."""
        counts: Counts = {}
        for key in sorted(self.groups, key=lambda k: (k[0], not k[1])):
            width = self.groups[key][0].width
            counts[key] = width if key[0] in protected else self._near((1 - self.asked.ratio) * width, width)
            routed = self.groups.get((key[0], True))
            if not key[1] and routed and width % routed[0].width == 0:
                counts[key] = width // routed[0].width * counts[key[0], True]
        return self._checked(counts)

    def ranked(self, protected: Sequence[int]) -> Counts:
        """Ranks of all layers together: the r-th best neuron of every expert of a layer stays or goes as one."""
        entries: list[tuple[float, int, tuple[int, bool]]] = []
        total = sum(len(parts) * parts[0].width for parts in self.groups.values())
        scores = self.dense()
        for key, parts in self.groups.items():
            if key[0] in protected:
                continue
            first = len(self.groups.get((key[0], False), [])) if key[1] else 0
            ranks = np.sum([np.sort(scores[key[0]][first + i]) for i in range(len(parts))], axis=0)
            if self.criterion.standardize:
                ranks = (ranks - ranks.mean()) / (ranks.std() or 1.0)
            entries += [(float(s), len(parts), key) for s in ranks[:-1]]  # one neuron stays whatever happens
        counts = {key: parts[0].width for key, parts in self.groups.items()}
        left = round(self.asked.ratio * total)
        for _, cost, key in sorted(entries, key=lambda e: e[0]):
            if left < cost:
                continue
            counts[key] -= 1
            left -= cost
        return self._checked({key: self._near(n, self.groups[key][0].width) for key, n in counts.items()})

    def _near(self, wanted: float, width: int) -> int:
        """The nearest width that is a multiple of what was asked for, and that routed experts can be run with.

        Shared experts and dense layers follow: some configs have one entry for the width of all.
        """
        m = math.lcm(self.asked.multiple_of, math.gcd(width, ALIGNED))
        if width <= m:
            return width
        return width if wanted >= width else max(m, round(wanted / m) * m)

    def _checked(self, counts: Counts) -> Counts:
        if all(counts[key] >= parts[0].width for key, parts in self.groups.items()):
            raise InputError(
                f"ratio={self.asked.ratio} removes no neuron of any expert (multiple_of={self.asked.multiple_of})"
            )
        return counts

    # -- scores ------------------------------------------------------------------------------------------------------

    def dense(self) -> list[list[NDArray[np.float64]]]:
        """Scores of every part of every layer, while the model is dense; computed once."""
        if not self._dense:
            if "activations" in self.criterion.needs:

                def look(layer: ExpertLayer, found: list[MeasuredPart]) -> list[Change | None]:
                    self._dense.append([self.score(m.part, m) for m in found])
                    return [None] * len(found)

                self._walk("score", look, sequential=False)
            else:
                self._dense = [[self.score(part, None) for part in parts_of(layer)] for layer in self.body.layers]
        return self._dense

    def score(self, part: Part, seen: MeasuredPart | None) -> NDArray[np.float64]:
        """Scores of the neurons of one expert."""
        moments = None
        if seen is not None:
            self.calls.setdefault(part.mlp.index, []).append(seen.calls)
            if seen.measured is None:
                raise InputError(
                    f"calibration never calls {part.name}: method={self.asked.method!r} measures an expert on the "
                    "tokens that call it, and says nothing of this one: give other text, or method='magnitude'"
                )
            if seen.calls < FEW * part.width:
                self.asked.notes.append(f"{part.name} of {part.width} neurons was called by {seen.calls} tokens only")
            moments = seen.measured.all
            moments = moments if part.has_bias else Uncentred(moments)
        output, group = part.mlp.down, (part.mlp.index, part.routed is not None)
        evidence = Evidence(
            layer=part.mlp, units=NEURONS, output=output, weight=output.weight().detach().double(),
            generator=self.generator, moments=moments, metric=self.metric.get(group),
        )  # fmt: skip
        scores = torch.as_tensor(self.criterion.score(evidence)).detach().cpu().numpy().astype(float)
        if scores.shape != (part.width,) or not np.isfinite(scores).all():
            raise InputError(f"method={self.asked.method!r} gave no finite score for each neuron of {part.name}")
        return scores

    def choose(self, counts: Counts) -> tuple[NDArray[np.int64], ...]:
        """Neurons of each layer's slice that stay; sequentially, on the prefix as pruned and refitted so far."""
        asked = self.asked
        sequential = asked.windows is not None and (
            self.criterion.sequential if asked.sequential is None else asked.sequential
        )
        if not (sequential and "activations" in self.criterion.needs):
            scores = self.dense()
            return tuple(
                _joined([p.start + self._best(p, s, n) for (p, n), s in zip(self.of(layer, counts), of)])
                for layer, of in zip(self.body.layers, scores)
            )
        kept: list[NDArray[np.int64]] = []
        self.calls = {}

        def step(layer: ExpertLayer, found: list[MeasuredPart]) -> list[Change | None]:
            chosen = [self._best(m.part, self.score(m.part, m), n) for m, (_, n) in zip(found, self.of(layer, counts))]
            kept.append(_joined([m.part.start + c for m, c in zip(found, chosen)]))
            if layer is self.body.layers[-1]:
                return [None] * len(found)
            return [refit(m, torch.from_numpy(c)) for m, c in zip(found, chosen)]

        with unchanged(down_projections(self.body)):
            self._walk("choose", step, sequential=True)
        return tuple(kept)

    def _best(self, part: Part, scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
        return self.criterion.choose(scores, count, part.mlp.index, NEURONS)

    def _walk(self, what: str, step: object, *, sequential: bool) -> None:
        assert self.asked.windows is not None
        walk_mixture(
            self.model, self.body, self.asked.windows, step, sequential=sequential, weights=self.asked.weights,  # type: ignore[arg-type]
            progress=what,
        )  # fmt: skip


def _joined(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """One after the other; a block of attention alone has none."""
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def refit(seen: MeasuredPart, kept: Tensor, kind: str = "least-squares", ridge: float | None = None) -> Change:
    """What becomes of an expert's down projection: refitted to its own output; cut only, where it was never called."""
    part = seen.part
    if seen.measured is None or part.normed or (len(kept) == part.width and kind == "bias"):
        return Change(kept)
    return fit(seen.measured, kept, kind, ridge, intercept=part.has_bias)
