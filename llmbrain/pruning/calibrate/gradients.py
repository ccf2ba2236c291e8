"""Second moments of the loss gradient at each layer's output, and first-order importances of its units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.families import Anatomy, Projection
from llmbrain.anatomy.offload import is_away
from llmbrain.anatomy.units import NEURONS, Units
from llmbrain.distributed import ALONE, Ranks, ranks
from llmbrain.evaluation.perplexity import next_token_losses, predicts_next_token
from llmbrain.hooks.change import recomputing
from llmbrain.hooks.listen import hear_outputs
from llmbrain.hooks.text import BATCH_TOKENS, batches, digest, embeddings, evaluating
from llmbrain.pruning.calibrate.losses import last_states
from llmbrain.pruning.calibrate.moments import gram

LARGE = 2**30  # bytes kept for a backward pass, from which on blocks run twice instead


def gradient_pass(
    model: nn.Module,
    body: Anatomy,
    windows: Tensor,
    units: Units = NEURONS,
    *,
    metric: bool = True,
    taylor: bool = False,
    weights: Tensor | None = None,
    places: Sequence[nn.Module] | None = None,
    to_owners: bool = False,
) -> dict[str, list[Tensor]]:
    """Second moments of the loss gradient, by one backward pass over the windows, which the ranks of a group share.

    For a model that predicts no next token (an encoder, say) the gradient is that of the last hidden states in a random
    direction, ``J^T r`` with r ~ N(0, 1): its second moment is the curvature ``J^T J`` of half their squared change.

    Parameters
    ----------
    windows : (n, window) int64
    units : Units
        Whose output projections and weights are looked at.
    metric : bool
        Give ``G = E[g g^T]`` of each layer, g the gradient of the summed loss by the output of their projection at a
        token
        (the output-side Kronecker factor of LLM Surgeon, arXiv 2312.17244, eq. 6).
    weights : (n, window) float, optional
        How much each token counts in the metric.
    places : sequence of module, optional
        Whose outputs the metric is of, instead of the output projections of `units`; no ``taylor`` then.
    taylor : bool
        Give each unit's first-order importance, ``sum |w * dL/dw|`` over its weights (LLM-Pruner, arXiv 2305.11627,
        eq. 5, `param_first`).
    to_owners : bool
        Of several ranks, only the one that owns a layer (every `size`-th) gets its metric.

    Returns
    -------
    dict
        ``"metric"``: float64 ``(hidden, hidden)`` a layer; ``"taylor"``: float64 ``(units,)`` a layer.
    """
    causal = predicts_next_token(model)
    if taylor and not causal:
        raise InputError(
            f"model {type(model).__name__} predicts no next token, as method='taylor' needs: use another one"
        )
    away = is_away(model)
    if taylor and away:
        raise InputError(
            "method='taylor' sums gradients of all weights, and those of this model are offloaded: use another method, "
            "or load the model whole"
        )
    probe = torch.Generator().manual_seed(0)
    outputs = [None if units.is_gone(layer) else units.output(layer) for layer in body.layers if places is None]
    listened = places if places is not None else [None if out is None else out.module for out in outputs]
    grams: list[Any] = [0.0] * len(listened)
    counts: Tensor | None = None  # weights of the tokens of the batch at hand

    def watch(i: int) -> Callable[[Tensor, Tensor], None]:
        def hook(entering: Tensor, output: Tensor) -> None:
            def take(g: Tensor) -> None:
                g = g.detach().float().flatten(0, -2)
                grams[i] = grams[i] + gram(g, None if counts is None else counts.to(g.device)).double()

            output.register_hook(take)

        return hook

    layers = body.layers if places is None else []
    projections = [() if units.is_gone(layer) else units.projections(layer) for layer in layers]
    wanted = {id(p) for of in projections for j in of for p in j.module.parameters(recurse=False)}
    before = [(p, p.requires_grad) for p in model.parameters()]
    heard: list[tuple[nn.Module, Any]] = [(m, watch(i)) for i, m in enumerate(listened) if m is not None]
    table: Any = embeddings(model)
    leaf = None if taylor or table is None or table.weight.is_meta else table.weight
    if not taylor and leaf is None:  # the table is offloaded, too: what comes out of it is the leaf
        heard.append((table, lambda entering, output: (output.requires_grad_(True), None)[1]))
    parts, missed = batches(windows, batch_tokens(body, windows.shape[1], away)), list[torch.Size]()
    once = to_recompute(body, parts[0].numel(), away)
    counted = None if weights is None else weights.split(len(parts[0]))
    try:
        for p, _ in before:
            p.requires_grad_(taylor and id(p) in wanted)
        if leaf is not None:  # one leaf is enough for gradients to reach every layer
            leaf.requires_grad_(True)
        team = ranks() if places is None else ALONE
        facts = {"windows": digest(windows)} if team.size > 1 else {}
        with (
            team.job("gradients", **facts), evaluating(model, gradients=True), recomputing(once),
            hear_outputs(model, heard),
        ):  # fmt: skip
            for i, batch in enumerate(parts):
                if i not in team.mine(len(parts)):
                    missed.append(batch.shape)
                    continue
                if counted is not None:
                    counts = counted[i].flatten()
                if causal:
                    next_token_losses(model, batch).sum().backward()
                else:
                    states = last_states(model, batch)
                    for shape in missed:  # what other ranks draw
                        torch.randn((*shape, states.shape[-1]), generator=probe)
                    missed.clear()
                    states.backward(torch.randn(states.shape, generator=probe).to(states.device))
                if leaf is not None:
                    leaf.grad = None
        if team.size > 1:
            with team.job("gradients"):
                _sum(team, grams if metric else [], outputs, projections if taylor else [], to_owners)
        n = windows.numel()
        found: dict[str, list[Tensor]] = {}
        if metric:
            found["metric"] = [g / n for g in grams]
        if taylor:
            found["taylor"] = [sum(_first_order(p) for p in of) for of in projections]  # type: ignore[misc]
        return found
    finally:
        for p, flag in before:
            p.requires_grad_(flag)
            if id(p) in wanted:
                p.grad = None


def batch_tokens(body: Anatomy, window: int, away: bool = False) -> int:
    """Tokens in a batch: fewer where their signals can then be kept, so that no block runs twice."""
    fit = LARGE // _kept(body, 1)
    return BATCH_TOKENS if away or fit < window else min(BATCH_TOKENS, fit)


def to_recompute(body: Anatomy, n_tokens: int, away: bool = False) -> list[nn.Module]:
    """Blocks that run again in the backward pass, since their weights (`away`) or signals would pile up until then.

    A forward pass over a batch of `n_tokens` keeps some copies of all neurons.
    """
    return [layer.block for layer in body.layers] if away or _kept(body, n_tokens) > LARGE else []


def _kept(body: Anatomy, n_tokens: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, about."""
    return max(1, 5 * n_tokens * sum(body.widths) * 4)


def _sum(
    team: Ranks,
    grams: list[Any],
    outputs: Sequence[Projection | None],
    projections: Sequence[Sequence[Projection]],
    to_owners: bool,
) -> None:
    """Add what the windows of the other ranks gave; a rank without windows has zeros."""  # fmt: skip
    for i, own in enumerate(grams):
        output = outputs[i]
        if output is not None:
            size = output.weight().shape[1]
            own = own if isinstance(own, Tensor) else torch.zeros(size, size, dtype=torch.float64)
            (grams[i],) = team.sum([own], "gradients", i % team.size if to_owners else None)
    for module in {id(p.module): p.module for of in projections for p in of}.values():
        for p in module.parameters(recurse=False):
            (p.grad,) = team.sum([torch.zeros_like(p) if p.grad is None else p.grad], "gradients")


def _first_order(projection: Any) -> Tensor:
    """``|w * grad|`` summed over each unit's weights; float64 ``(units,)``."""
    weight, grad = projection.module.weight, projection.module.weight.grad
    product = (weight.detach() * grad).abs().double()
    product = product if projection.axis == 0 else product.T
    rows = product[projection.start : projection.start + projection.units * projection.size]
    return rows.sum(1).reshape(projection.units, -1).sum(1)
