"""Scores of a model's units by one criterion: what it needs is gathered once, while the model is dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmbrain._validation import InputError, check_range
from llmbrain.anatomy.families import LayerAnatomy, Projection
from llmbrain.anatomy.offload import present
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.anatomy.surgery import Change, check_cuttable
from llmbrain.anatomy.units import NEURONS, Units
from llmbrain.pruning.calibrate.gradients import gradient_pass
from llmbrain.pruning.calibrate.steps import Found, Measured, Step
from llmbrain.pruning.calibrate.stream import walk
from llmbrain.pruning.calibrate.windows import check_enough, check_weights
from llmbrain.pruning.criteria.base import Evidence, Material, criterion
from llmbrain.pruning.verify import check_reads

Scores = list[NDArray[np.float64]]
Kept = tuple[NDArray[np.int64], ...]


class Scorer:
    """Scores of units by one criterion.

    Parameters
    ----------
    method : str
        A name in `CRITERIA`.
    material : Material
        Its model is dense, now.

    Attributes
    ----------
    targets : bool array ``(n_neurons,)``, optional
        Neurons that go before any other.
    balanced : bool
        Whether the criterion itself weighs the calibration tokens.
    """

    def __init__(self, method: str, material: Material) -> None:
        self.criterion, self.material = criterion(method)(), material
        check_cuttable(material.body)
        if material.token_balance is not None:
            check_range("token_balance", material.token_balance, 0, 1)
        windows = material.windows
        if self.criterion.needs & {"activations", "gradients", "text"}:
            if windows is None:
                raise InputError(f"method={method!r} needs calibration texts (or scans with tokens)")
            check_enough(windows, max(material.body.widths))
            check_weights(material.weights, windows)
            check_reads(material.model, windows)
        self.targets: NDArray[np.bool_] | None = None
        self._generator = torch.Generator().manual_seed(material.random_state)
        self._metric: dict[Units, list[Tensor]] = {}
        self._dense: dict[Units, Scores] = {}
        self._learned: set[Units] = set()
        own = self.criterion.weigh(material)
        self.balanced = own is not None
        if own is not None:
            material.weights = own
        self.learn(NEURONS)

    def learn(self, units: Units) -> None:
        """Gather what needs the whole model, once; the model must be dense then."""
        if units in self._learned:
            return
        given = self.material
        if "gradients" in self.criterion.needs:
            assert given.windows is not None
            owned = "activations" in self.criterion.needs  # scores are then found by the owner of a layer
            found = gradient_pass(
                given.model, given.body, given.windows, units, weights=given.weights, to_owners=owned
            )  # fmt: skip
            self._metric[units] = found["metric"]
        self.criterion.prepare(given, units)
        self._learned.add(units)

    def output(self, layer: int, units: Units) -> Projection:
        """The projection that a layer's units enter."""
        output = units.output(self.material.body.layers[layer])
        assert output is not None
        return output

    def score(self, measured: Measured | None, layer: int, units: Units) -> NDArray[np.float64]:
        """Scores of one layer's units, from what was `measured` where the criterion needs activations."""
        self.learn(units)
        output = self.output(layer, units)
        metric = self._metric.get(units)
        with present(self.material.body.layers[layer].block):
            evidence = Evidence(
                layer=self.material.body.layers[layer],
                units=units,
                output=output,
                weight=output.weight().detach().double() if measured is None else measured.weight,
                generator=self._generator,
                moments=None if measured is None else measured.all,
                metric=None if metric is None else metric[layer],
            )
            scores = torch.as_tensor(self.criterion.score(evidence)).detach().cpu().numpy().astype(float)
        if scores.shape != (output.units,):
            raise InputError(
                f"method={self.criterion.name!r} gave scores of shape {scores.shape} for {output.units} {units.name}"
            )
        if self.targets is not None and units is NEURONS:  # what is to be forgotten goes first
            at = NeuronSpace(self.material.body.widths).layer_slice(layer)
            scores[self.targets[at]] = scores.min() - 1.0
        if not np.isfinite(scores).all():
            raise InputError(f"{output.path}: unit {int(np.argmin(np.isfinite(scores)))} has no finite score")
        return scores

    def dense_scores(self, units: Units = NEURONS) -> Scores:
        """Scores of all layers' units in the dense model; computed once."""
        self.learn(units)
        if units not in self._dense:
            layers = self.material.body.layers
            found: Scores = [np.zeros(0) for _ in layers]
            if "activations" in self.criterion.needs:

                def find(measured: Measured) -> Found:
                    return Found(arrays={"scores": self.score(measured, measured.layer.index, units)})

                def keep(layer: LayerAnatomy, at: Found) -> None:
                    found[layer.index] = at.arrays["scores"]

                self.look("score", self.step(find, keep), units)
            else:
                for i, layer in enumerate(layers):
                    if not units.is_gone(layer):
                        found[i] = self.score(None, i, units)
            self._dense[units] = found
        return self._dense[units]

    def remember(self, scores: Scores, units: Units) -> None:
        """Take scores of the dense model that were made on the way to something else."""
        self.learn(units)
        self._dense[units] = scores

    def step(
        self, find: Callable[[Measured], Found], take: Callable[[LayerAnatomy, Found], None] | None = None
    ) -> Step:
        """A step of a walk that scores: where the criterion draws, all ranks go on from where its owner stopped."""
        draws = self._generator if self.criterion.draws else None

        def found(measured: Measured) -> Found:
            made = find(measured)
            if draws is not None:
                made.arrays["drawn"] = draws.get_state().numpy()
            return made

        def taken(layer: LayerAnatomy, made: Found) -> None:
            if draws is not None:
                draws.set_state(torch.from_numpy(made.arrays["drawn"]))
            if take is not None:
                take(layer, made)

        return Step(found, taken, in_turn=draws is not None)

    def look(self, what: str, step: Step, units: Units) -> None:
        """Visit every layer of the dense model, changing none."""
        self._walk(what, {units: step}, sequential=False)

    def best(self, counts: Sequence[int], units: Units) -> Kept:
        """The units of each layer that stay, by the scores of the dense model."""
        layers = self.material.body.layers
        if all(n in (0, units.count(layer)) for n, layer in zip(counts, layers)):
            return tuple(np.arange(n) for n in counts)
        scores = self.dense_scores(units)
        return tuple(self.criterion.choose(s, n, i, units) for i, (s, n) in enumerate(zip(scores, counts)))

    def cut(
        self,
        what: str,
        then: Callable[[Measured, NDArray[np.int64]], Change | None],
        counts: Mapping[Units, Sequence[int]],
        *,
        sequential: bool,
        took: Callable[[Units, int, NDArray[np.int64]], None] | None = None,
    ) -> None:
        """Walk through the layers, choose the best units of each, and do `then` with ``(measured, chosen)``.

        `took` is told what was chosen, layer by layer; of several ranks, on all. Sequentially, units are scored in the
        model as changed so far; else in the dense one.
        """
        known = {} if sequential else {units: self.best(of, units) for units, of in counts.items()}

        def step(units: Units) -> Step:
            def find(measured: Measured) -> Found:
                i = measured.layer.index
                if known:
                    chosen = known[units][i]
                elif counts[units][i] in (0, measured.output.units):  # nothing to choose from
                    chosen = np.arange(counts[units][i])
                else:
                    chosen = self.criterion.choose(self.score(measured, i, units), counts[units][i], i, units)
                return Found(then(measured, chosen), {"chosen": chosen})

            def take(layer: LayerAnatomy, found: Found) -> None:
                if took is not None:
                    took(units, layer.index, found.arrays["chosen"])

            return self.step(find, take)

        self._walk(what, {units: step(units) for units in counts}, sequential=True)

    def _walk(self, what: str, steps: Mapping[Units, Step], *, sequential: bool) -> None:
        given = self.material
        assert given.windows is not None
        walk(given.model, given.body, given.windows, steps, sequential=sequential, weights=given.weights, progress=what)
