"""Relevance of neurons (RelP)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.families import Anatomy
from llmbrain.anatomy.offload import is_away
from llmbrain.anatomy.units import NEURONS, Units
from llmbrain.distributed import ranks
from llmbrain.evaluation.perplexity import predicts_next_token
from llmbrain.hooks.change import change_inputs
from llmbrain.hooks.relevance import halved, relevance_rules
from llmbrain.hooks.text import batches, input_device
from llmbrain.pruning.calibrate.losses import gradients_of, log_odds
from llmbrain.pruning.criteria.base import Criterion, Evidence, Material, register


@register("relp", "text")
class RelP(Criterion):
    """Mean ``|x_j R_j|`` over tokens, R the relevance of the right tokens' log odds (RelP, arXiv 2508.21258).

    The publication attributes a difference between two prompts; on plain text the difference is that from silence.
    """

    def __init__(self) -> None:
        self._scores: list[Tensor] = []

    def prepare(self, material: Material, units: Units) -> None:
        """One backward pass over the text."""
        if units is not NEURONS:
            raise InputError("method='relp' scores neurons only: leave head_ratio away")
        if is_away(material.model):
            raise InputError(
                "method='relp' keeps all blocks for a backward pass, and those of this model are offloaded: use "
                "another method, or load the model whole"
            )
        assert material.windows is not None
        self._scores, left = relevance(material.model, material.body, material.windows, material.weights)
        if left:
            material.notes.append(f"ordinary gradients, not relevance, through: {', '.join(left)}")

    def score(self, evidence: Evidence) -> Tensor:
        """As prepared."""
        return self._scores[evidence.layer.index]


def relevance(
    model: nn.Module, body: Anatomy, windows: Tensor, weights: Tensor | None = None, *, rules: bool = True
) -> tuple[list[Tensor], list[str]]:
    """Mean ``|x_j R_j|`` of every neuron over tokens, layer by layer; and what stayed an ordinary gradient.

    The ranks of a group share the windows.

    Parameters
    ----------
    windows : (n, window) int64
    weights : (n, window) float, optional
        How much the log odds of each token count.
    rules : bool
        False: R is the ordinary gradient.
    """
    if not predicts_next_token(model):
        raise InputError(
            f"model {type(model).__name__} predicts no next token, as method='relp' needs: use another one"
        )
    totals = [torch.zeros(width, dtype=torch.float64) for width in body.widths]
    signals: dict[int, Tensor] = {}

    def hear(i: int) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            signals[i] = halved(body.layers[i], x) if rules else x
            return signals[i]

        return edit

    edits = [(layer.down.module, hear(i)) for i, layer in enumerate(body.layers)]
    parts = [None] * len(batches(windows)) if weights is None else batches(weights)
    team = ranks()
    mine = team.mine(len(parts))
    leaf: Any = model.get_input_embeddings()  # type: ignore[operator]
    ruled: AbstractContextManager[list[str]] = relevance_rules(model, body) if rules else nullcontext([])
    with gradients_of(model, [leaf.weight]), change_inputs(model, edits), ruled as left:
        for ids, part in [(batches(windows)[i], parts[i]) for i in mine]:
            ids = ids.to(input_device(model))
            odds = log_odds(model(input_ids=ids).logits, ids)
            odds = odds if part is None else odds * part[:, 1:].to(odds.device)
            heard = [signals[i] for i in range(len(edits))]
            for total, x, g in zip(totals, heard, torch.autograd.grad(odds.sum(), heard)):
                total += (x.detach() * g).abs().flatten(0, -2).sum(0).double().cpu()
    with team.job("relevance"):
        totals = team.sum(totals, "relevance")
    return [total / windows.numel() for total in totals], left
