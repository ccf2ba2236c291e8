"""What `llmbrain.intervention.table.lesion_table` does otherwise for a mixture of experts: its sets and their scores.

A set is neurons of experts, or whole experts (their neurons, and the bias of what they give). One set at a time is in
force in a forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from llmbrain._validation import InputError
from llmbrain.anatomy.experts import ExpertAnatomy, expert_anatomy
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.hooks.text import evaluating, input_device
from llmbrain.intervention.evaluations import PASS_TOKENS, Evaluation, TokenEvaluation
from llmbrain.intervention.experts import Experts, change_mixture
from llmbrain.intervention.targets import Heads, neuron_mask

Masks = NDArray[np.bool_]


class MixtureSets:
    """Sets of a mixture of experts, as masks over its neurons.

    Parameters
    ----------
    model : module
    networks : dict of name -> what
        `Experts`, or anything that `neuron_mask` takes.
    """

    def __init__(self, model: nn.Module, networks: Mapping[str, Any]) -> None:
        self.model, self.body = model, expert_anatomy(model)
        self.space: NeuronSpace = self.body.space
        self.masks: dict[str, Masks] = {}
        self.experts: dict[str, Experts] = {}
        for name, what in networks.items():
            if isinstance(what, Heads):
                raise InputError(f"networks[{name!r}]: heads of a mixture of experts are not lesioned")
            if isinstance(what, Experts):
                self.experts[str(name)] = what
                self.masks[str(name)] = expert_mask(what, self.body)
            else:
                self.masks[str(name)] = neuron_mask(what, self.space, f"networks[{name!r}]")

    def random(self, name: str, n: int, rng: np.random.Generator) -> Masks:
        """Control sets of whole experts: as many of every layer, from all that it has; ``(n, n_neurons)``."""
        routed, drawn = dict(self.body.routed), np.zeros((n, self.space.n_neurons), dtype=bool)
        for layer, of in self.experts[name].by_layer(self.body).items():
            for row in drawn:
                chosen = rng.choice(routed[layer].count, len(of), replace=False)
                row |= expert_mask(Experts([(layer, int(e)) for e in chosen]), self.body)
        return drawn

    def score(
        self, sets: Masks, evaluations: Mapping[str, TokenEvaluation | Evaluation], *, whole: bool
    ) -> dict[str, NDArray[np.float64]]:
        """Score every set, silenced, by every evaluation; ``(n_sets, n_items)``.

        Parameters
        ----------
        sets : bool array ``(n_sets, n_neurons)``
        whole : bool
            Whether they are of whole experts.
        """
        scores: dict[str, list[NDArray[np.float64]]] = {name: [] for name in evaluations}
        for mask in sets:
            what: Any = whole_experts(mask, self.body) if whole else mask
            for name, evaluation in evaluations.items():
                if not mask.any():
                    scores[name].append(_score(self.model, evaluation, name))
                    continue
                with change_mixture(self.model, what):
                    scores[name].append(_score(self.model, evaluation, name))
        return {name: np.stack(of) for name, of in scores.items()}


def expert_mask(what: Experts, body: ExpertAnatomy) -> Masks:
    """The neurons of whole experts, ``(n_neurons,)``."""
    mask = np.zeros(body.space.n_neurons, dtype=bool)
    for layer, of in what.by_layer(body).items():
        first = len(body.layers[layer].shared)
        for expert in of:
            mask[body.space.expert_slice(layer, first + expert)] = True
    return mask


def whole_experts(mask: Masks, body: ExpertAnatomy) -> Experts:
    """The experts that a mask of whole ones holds."""
    found = []
    for layer, routed in body.routed:
        first = len(body.layers[layer].shared)
        found += [(layer, e) for e in range(routed.count) if mask[body.space.expert_slice(layer, first + e)].all()]
    return Experts(found)


def _score(model: nn.Module, evaluation: TokenEvaluation | Evaluation, name: str) -> NDArray[np.float64]:
    if not isinstance(evaluation, TokenEvaluation):
        values = np.atleast_1d(np.asarray(evaluation(model), dtype=np.float64))
        if values.ndim != 1 or not len(values):
            raise InputError(f"evaluations[{name!r}] gave shape {values.shape}: a number, or one number an item")
        return values
    size, parts = max(1, PASS_TOKENS // evaluation.ids.shape[1]), list[torch.Tensor]()
    rows: Sequence[torch.Tensor] = torch.arange(len(evaluation)).split(size)
    with evaluating(model):
        for row in rows:
            logits = model(input_ids=evaluation.ids[row].to(input_device(model))).logits
            parts.append(evaluation.of(logits, row).double().cpu())
    return torch.cat(parts).numpy()
