"""What `llmbrain.intervention.table.lesion_table` does otherwise for a mixture of experts: its sets and their scores.

A set is neurons of experts, or whole experts (their neurons, and the bias of what they give). One set at a time is in
force in a forward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from llmbrain._validation import InputError
from llmbrain.anatomy.experts import ExpertAnatomy, expert_anatomy
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.evaluation.perplexity import check_causal
from llmbrain.hooks.text import evaluating, input_device
from llmbrain.intervention.evaluations import PASS_TOKENS, Evaluation, TokenEvaluation
from llmbrain.intervention.expert_values import READS, Held, held_over, is_readable
from llmbrain.intervention.experts import Experts, Filling, change_mixture, mask_of
from llmbrain.intervention.targets import Heads, neuron_mask

Masks = NDArray[np.bool_]
Scores = Mapping[str, NDArray[np.float64]]
"""Evaluation -> ``(n_sets, n_items)``."""
STRATUM = 4  # experts of a layer that count as called equally often, at least


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
                self.masks[str(name)] = mask_of(what, self.body)
            else:
                self.masks[str(name)] = neuron_mask(what, self.space, f"networks[{name!r}]")

    def held(
        self, evaluations: Mapping[str, TokenEvaluation | Evaluation], reference: Any, *, means: bool
    ) -> Held | None:
        """What neurons held over the reference, or else over the tokens of the evaluations.

        None for arrays, which do not tell which experts were called, where neither experts nor `means` need to know.

        Raises
        ------
        InputError
            Where they do.
        """
        tokens = [e for e in evaluations.values() if isinstance(e, TokenEvaluation)]
        given = tokens if reference is None else reference
        if is_readable(given):
            return held_over(self.model, self.body, given)
        if means or self.experts or reference is None:
            raise InputError(
                "controls that are called as often and value='mean' need to know which experts are called: pass "
                f"reference= ({READS}), or n_matched=0 and value='zero'"
            )
        return None

    def random(self, name: str, n: int, rng: np.random.Generator) -> Masks:
        """Control sets of whole experts: as many of every layer, from all that it has; ``(n, n_neurons)``."""
        return self._drawn(name, n, rng, {layer: [np.arange(r.count)] for layer, r in self.body.routed})

    def called_alike(self, name: str, n: int, rng: np.random.Generator, held: Held | None) -> Masks:
        """Control sets of experts called about as often: the experts of a layer are put in order of how many tokens
        called them and cut into groups of at least 4; a draw takes as many of each group, those of the set among them.

        There are none where a layer has fewer experts outside the set than inside.
        """
        if held is None:
            return np.zeros((0, self.space.n_neurons), dtype=bool)
        routed, strata = dict(self.body.routed), {}
        for layer, of in self.experts[name].by_layer(self.body).items():
            if routed[layer].count < 2 * len(of):
                return np.zeros((0, self.space.n_neurons), dtype=bool)
            order = np.argsort(held.calls[layer], kind="stable")
            strata[layer] = np.array_split(order, max(1, len(order) // STRATUM))
        return self._drawn(name, n, rng, strata)

    def _drawn(
        self, name: str, n: int, rng: np.random.Generator, strata: Mapping[int, Sequence[NDArray[np.int64]]]
    ) -> Masks:
        drawn = np.zeros((n, self.space.n_neurons), dtype=bool)
        for layer, of in self.experts[name].by_layer(self.body).items():
            for stratum in strata[layer]:
                count = len(set(stratum.tolist()) & set(of))
                for row in drawn:
                    chosen = rng.choice(stratum, count, replace=False)
                    row |= mask_of(Experts([(layer, int(e)) for e in chosen]), self.body)
        return drawn

    def score(
        self, sets: Masks, evaluations: Mapping[str, TokenEvaluation | Evaluation], *, whole: bool,
        fill: NDArray[np.float64] | None = None,
    ) -> dict[str, NDArray[np.float64]]:  # fmt: skip
        """Score every set, lesioned, by every evaluation; ``(n_sets, n_items)``.

        Parameters
        ----------
        sets : bool array ``(n_sets, n_neurons)``
        whole : bool
            Whether they are of whole experts.
        fill : float64 ``(n_neurons,)``, optional
            What lesioned neurons hold instead of zero.
        """
        filling = None if fill is None else Filling(means=fill)
        scores: dict[str, list[NDArray[np.float64]]] = {name: [] for name in evaluations}
        if not sets.any() and any(isinstance(e, TokenEvaluation) for e in evaluations.values()):
            check_causal(self.model)
        for mask in sets:
            what: Any = whole_experts(mask, self.body) if whole else mask
            for name, evaluation in evaluations.items():
                if not mask.any():
                    scores[name].append(_score(self.model, evaluation, name))
                    continue
                with change_mixture(self.model, what, filling=filling):
                    scores[name].append(_score(self.model, evaluation, name))
        for name, of in scores.items():
            if not np.isfinite(of).all():
                raise InputError(f"evaluations[{name!r}] gives nan or inf: an evaluation must be finite")
        return {name: np.stack(of) for name, of in scores.items()}

    def say_silent(self, scores: Mapping[str, Scores], baseline: Scores) -> None:
        """Warn of experts, and of controls, whose lesion changed not one item: they are not called there."""
        for name in self.experts:
            for evaluation, of in scores[name].items():
                silent = (of == baseline[evaluation]).all(axis=1)
                if silent[0] or silent[1:].any():
                    warnings.warn(
                        f"networks[{name!r}], evaluation {evaluation!r}: "
                        + "no token calls its experts, so that its effect is zero; " * bool(silent[0])
                        + f"{silent[1:].sum()} of its {len(silent) - 1} controls change nothing there",
                        UserWarning,
                        stacklevel=3,
                    )


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
