"""What is known about a model's units, gathered once while it is dense, and the scores a criterion makes of it.

Units are the neurons of MLPs or, with ``heads=True``, the key/value groups of attention heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError, check_range
from llmbrain.anatomy.families import Projection, anatomy
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.anatomy.surgery import check_cuttable
from llmbrain.pruning.calibrate.gradients import gradient_pass
from llmbrain.pruning.calibrate.walk import Site, Step, walk
from llmbrain.pruning.calibrate.windows import check_enough, check_weights, signals_of_windows
from llmbrain.pruning.criteria import Evidence, criterion
from llmbrain.pruning.criteria.networks import (
    BALANCE,
    COVER,
    balanced_weights,
    covered,
    layer_masks,
    unexplained_energy,
)
from llmbrain.pruning.criteria.published import PublishedScores, published_scores

GROUP_SIZE = 40  # texts in a group of the published rule


@dataclass
class _Known:
    """One entry a layer of what was computed for the whole model; None where the criterion does not need it."""

    metric: list[Tensor] | None = None
    taylor: list[Tensor] | None = None
    published: list[NDArray[np.float64]] | None = None
    masks: list[NDArray[np.bool_]] | None = None
    dense: list[NDArray[np.float64]] | None = None


class Scorer:
    """Scores of neurons and of key/value groups by one criterion; parameters as in `plan_pruning`.

    Attributes
    ----------
    targets : bool array ``(n_neurons,)``, optional
        Neurons that go before any other.
    weights : float tensor ``(n_windows, window)``, optional
        How much each calibration token counts.
    balanced : bool
        Whether they are those of networks.
    details : dict
        What the plan should tell; ``"notes"`` are sentences.
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
        token_balance: float = BALANCE,
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
            check_weights(weights, windows)
        self.notes: list[str] = []
        self.details: dict[str, Any] = {"notes": self.notes}
        self.weights, self.balanced = weights, False
        self.targets: NDArray[np.bool_] | None = None
        self._generator = torch.Generator().manual_seed(random_state)
        self._random_state, self._scans, self._rule = random_state, scans, dict(rule or {})
        self._networks = networks if "networks" in self.criterion.needs else None
        if "networks" in self.criterion.needs:
            self._use_networks(token_balance)
        self._known: dict[bool, _Known] = {}
        self.learn()

    def learn(self, *, heads: bool = False) -> _Known:
        """Gather what needs the whole model, once; the model must be dense then."""
        if heads not in self._known:
            known, needs = _Known(), self.criterion.needs
            if needs & {"metric", "taylor"}:
                assert self.windows is not None
                found = gradient_pass(
                    self.model, self.body, self.windows, metric="metric" in needs, taylor="taylor" in needs,
                    weights=self.weights, heads=heads,
                )  # fmt: skip
                known.metric, known.taylor = found.get("metric"), found.get("taylor")
            if "published" in needs:
                known.published = self._by_rule_of_heads() if heads else self._by_rule()
            if self._networks is not None:
                known.masks = layer_masks(self._networks, self.body, heads=heads)
            self._known[heads] = known
        return self._known[heads]

    def _use_networks(self, token_balance: float) -> None:
        if self._networks is None:
            self.notes.append("no networks given: tokens count alike, nothing is covered")
            return
        layer_masks(self._networks, self.body)  # fails before any work
        if token_balance and self.weights is None and self.windows is not None:
            energy = unexplained_energy(self.model, self.body, self.windows, self._networks)
            self.weights = balanced_weights(energy, token_balance)
            self.balanced = True
        applied = token_balance if self.balanced else 0.0
        self.details["networks"] = {"n": len(self._networks.maps), "token_balance": applied, "cover": COVER}

    def _by_rule(self) -> list[NDArray[np.float64]]:
        """Scores of neurons by the published rule."""
        gated = all(layer.gated for layer in self.body.layers)
        sites = self._rule.get("sites") or (("gate", "up") if gated else ("neuron",))
        if not gated and sites == ("neuron",):
            self.notes.append(
                "this model has no gate: the published rule reads the neuron signal instead of gate and up"
            )
        result = self._rule_scores(self.body.widths, **{**self._rule, "sites": sites})
        self.details["published"] = result.details
        return result.scores

    def _by_rule_of_heads(self) -> list[NDArray[np.float64]]:
        """Scores of groups by the same rule at the site ``head``: the best head's.

        A layer has too few heads for an ICA of its own, so one ICA takes the heads of all layers.
        """
        widths = [layer.n_heads for layer in self.body.layers]
        result = self._rule_scores(widths, **{**self._rule, "sites": ("head",), "scope": "model"})
        self.details["published_heads"] = result.details
        self.notes.append("heads by the published rule: one ICA of all heads, a group as high as its best head")
        units = [self.output(i, heads=True).units for i in range(len(widths))]
        return [scores.reshape(n, -1).max(1) for scores, n in zip(result.scores, units)]

    def _rule_scores(self, widths: Sequence[int], *, sites: Sequence[str], **rule: Any) -> PublishedScores:
        """Scores of units at `sites`, from scans that have them or from the calibration windows."""
        scans = self._scans
        if not scans or any(s not in scan.sites for scan in scans for s in sites):
            if self.windows is None:
                raise InputError(f"method='published' needs scans with the sites {list(sites)}, or calibration texts")
            scans = signals_of_windows(self.model, self.body, self.windows, sites)
        options = {"n_groups": -(-len(scans) // GROUP_SIZE), "random_state": self._random_state, **rule}
        return published_scores(scans, widths, sites=sites, **options)

    # -- scores ------------------------------------------------------------------------------------------------------

    def output(self, layer: int, *, heads: bool = False) -> Projection:
        """The projection that a layer's units enter."""
        output = self.body.layers[layer].out if heads else self.body.layers[layer].down
        assert output is not None
        return output

    def score(self, site: Site | None, layer: int, *, heads: bool = False) -> NDArray[np.float64]:
        """Scores of one layer's units; `site` measured them, where the criterion needs that."""
        output, known = self.output(layer, heads=heads), self.learn(heads=heads)

        def of_layer(values: Sequence[Any] | None) -> Tensor | None:
            return None if values is None else torch.as_tensor(values[layer])

        evidence = Evidence(
            layer=self.body.layers[layer],
            output=output,
            weight=output.weight().detach().double() if site is None else site.weight,
            generator=self._generator,
            moments=None if site is None else site.all,
            metric=of_layer(known.metric),
            taylor=of_layer(known.taylor),
            published=of_layer(known.published),
        )
        scores = self.criterion.score(evidence).detach().cpu().numpy().astype(float)
        if self.targets is not None and not heads:  # what is to be forgotten goes first
            scores[self.targets[NeuronSpace(self.body.widths).layer_slice(layer)]] = scores.min() - 1.0
        if not np.isfinite(scores).all():
            raise InputError(f"{output.path}: unit {int(np.argmin(np.isfinite(scores)))} has no finite score")
        return scores

    def dense_scores(self, *, heads: bool = False) -> list[NDArray[np.float64]]:
        """Scores of all layers' units in the dense model; computed once."""
        known = self.learn(heads=heads)
        if known.dense is None:
            found: list[NDArray[np.float64]] = []
            if "moments" in self.criterion.needs:
                self.look("score", lambda site: found.append(self.score(site, site.layer.index, heads=heads)), heads)
            else:
                found = [self.score(None, i, heads=heads) for i in range(len(self.body.layers))]
            known.dense = found
        return known.dense

    def remember(self, scores: list[NDArray[np.float64]], *, heads: bool = False) -> None:
        """Take scores of the dense model that were made on the way to something else."""
        self.learn(heads=heads).dense = scores

    def look(self, what: str, step: Callable[[Site], None], heads: bool = False) -> None:
        """Visit every layer of the dense model, changing none."""
        assert self.windows is not None
        steps: tuple[Step | None, Step | None] = (None, step) if heads else (step, None)
        walk(
            self.model, self.body, self.windows, steps[0], heads=steps[1], sequential=False, weights=self.weights,
            progress=what,
        )  # fmt: skip

    def pick(self, scores: NDArray[np.float64], count: int, layer: int, *, heads: bool = False) -> NDArray[np.int64]:
        """Ascending indices of the `count` best units; with networks, such that each keeps some of its key units."""
        masks = self.learn(heads=heads).masks
        return best_units(scores, count) if masks is None else covered(scores, count, masks[layer])


def best_units(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Ascending indices of the `count` best."""
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int64)
