"""Refit experts that stay to what their layer gave before others were cut.

Without some experts a token goes to others, and what they give is not what it was. The down projections of those that
stay are fitted so that the sum over the experts of a token comes near the layer's dense output ``y``. All of them
together would be one system of all neurons of the layer. Instead each expert takes its share of what is missing
(``r = y - sum_e g_e f_e``): with ``S`` the sum of the gates g of a token,

    |sum_e g_e d_e - r|^2 <= S sum_e g_e |d_e - r / S|^2,

with equality at d = 0, so that least squares of every expert alone, to ``f_e + r / S`` with weights ``S g_e``, never
adds to the error (majorization by Jensen's inequality), and can be done again. It is kept where it helps on text that
was held out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmbrain._progress import bar
from llmbrain.anatomy.expert_parts import Part, parts_of
from llmbrain.anatomy.experts import ExpertAnatomy, ExpertLayer
from llmbrain.anatomy.surgery import write
from llmbrain.anatomy.units import NEURONS
from llmbrain.hooks.experts import Visits, hearing_experts, rerouted, summed
from llmbrain.hooks.listen import hear_outputs
from llmbrain.hooks.text import evaluating
from llmbrain.pruning.calibrate.mixture import weights_by_batch
from llmbrain.pruning.calibrate.moments import Moments
from llmbrain.pruning.calibrate.stream import Measured, Stream, WholePasses, is_held_out, stream_of
from llmbrain.pruning.repair.fit import fit

SWEEPS = 3


@dataclass
class _Look:
    """One pass over a layer: what each expert is to be fitted to, and how far the layer's output is off."""

    train: dict[int, Moments]
    held: dict[int, Moments]
    error: float
    size: float


def repair_experts(
    model: nn.Module,
    body: ExpertAnatomy,
    windows: Tensor,
    kept: Mapping[int, Sequence[int]],
    *,
    ridge: float | None = None,
    sequential: bool = True,
    weights: Tensor | None = None,
) -> dict[str, list[float]]:
    """Write refitted down projections of the experts that stay into a model whose other experts are still there.

    Parameters
    ----------
    windows : (n, window) int64
    kept : mapping
        Routed experts that stay, by layer.
    ridge, sequential, weights
        As in `llmbrain.prune`.

    Returns
    -------
    dict
        By layer, the mean squared error of its routed output on held-out text, relative to its mean square: without
        repair, and with it.
    """
    facts: dict[str, list[float]] = {}
    with evaluating(model), ExitStack() as stack:
        stream = stream_of(model, body, windows)
        counts = weights_by_batch(stream, weights)
        for layer in bar(body.layers, desc="repair", leave=False):
            routed, after = layer.routed, None
            if routed is not None and len(kept[layer.index]) < routed.count:
                wanted, dense = _dense(stream, routed.module)
                stack.enter_context(rerouted({layer.index: routed}, {layer.index: kept[layer.index]}))
                facts[str(layer.index)] = _repair(stream, layer, wanted, counts, ridge)
                after = None if sequential else dense
            stream.advance(after)
    return facts


def _dense(stream: Stream | WholePasses, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """What a layer's routed experts give, and its hidden states, with all of them."""
    given: list[Tensor] = []
    with hear_outputs(None, [(module, lambda entering, out: given.append(summed(module, out.detach()).clone()))]):
        return given, [stream.through(i) for i in range(len(stream.hidden))]


def _repair(
    stream: Stream | WholePasses, layer: ExpertLayer, wanted: list[Tensor], counts: list[Tensor] | None,
    ridge: float | None,
) -> list[float]:  # fmt: skip
    assert layer.routed is not None
    parts = {p.routed: p for p in parts_of(layer) if p.routed is not None}
    owner = layer.routed.module
    tensors = [t for n in ("down_proj", "down_proj_bias") if isinstance(t := getattr(owner, n, None), Tensor)]
    best, errors = [t.detach().clone() for t in tensors], list[float]()
    for sweep in range(SWEEPS + 1):
        seen = _look(stream, owner, parts, wanted, counts)
        if errors and seen.error >= min(errors):
            break
        errors.append(seen.error)
        best = [t.detach().clone() for t in tensors]
        if sweep < SWEEPS:
            for expert, part in parts.items():
                _fit(part, seen.train.get(expert), seen.held.get(expert), ridge)
    with torch.no_grad():
        for tensor, value in zip(tensors, best):
            tensor.copy_(value)
    return [round(e / max(seen.size, 1e-30), 6) for e in (errors[0], errors[-1])]


def _fit(part: Part, train: Moments | None, held: Moments | None, ridge: float | None) -> None:
    if train is None:
        return
    measured = Measured(part.mlp, NEURONS, part.mlp.down, train, held or Moments(train))
    write(part.mlp.down, fit(measured, torch.arange(part.width), "least-squares", ridge, intercept=part.has_bias))


def _look(
    stream: Stream | WholePasses, module: nn.Module, parts: Mapping[int, Part], wanted: list[Tensor],
    counts: list[Tensor] | None,
) -> _Look:  # fmt: skip
    seen = _Look({}, {}, 0.0, 0.0)
    n = len(stream.hidden)
    for i in range(n):
        held = is_held_out(i, n)
        into, judged = (seen.held if held else seen.train), held or n == 1
        token_weights = None if counts is None else counts[i].to(wanted[i].device).double()

        def listen(
            visits: Visits, i: int = i, into: dict[int, Moments] = into, judged: bool = judged,
            w: Tensor | None = token_weights,
        ) -> None:  # fmt: skip
            assert visits.outputs is not None
            gates, outputs, y = visits.weights.double(), visits.outputs.double(), wanted[i].double()
            missing = y - (gates[..., None] * outputs).sum(1)
            if judged:
                weight = torch.ones_like(y[:, 0]) if w is None else w
                seen.error += float((missing.square().sum(1) * weight).sum())
                seen.size += float((y.square().sum(1) * weight).sum())
            sums = gates.sum(1).clamp_min(1e-12)
            targets = outputs + (missing / sums[:, None])[:, None]
            for expert in parts:
                token, at = torch.where(visits.experts == expert)
                if not len(token):
                    continue
                x, weight = visits.neurons[token, at], sums[token] * gates[token, at]
                if w is not None:
                    weight = weight * w[token]
                if expert not in into:
                    into[expert] = Moments.about_zero(x.shape[1], y.shape[1], x.device)
                into[expert].add(x, targets[token, at], weight.float())

        with hearing_experts({module: listen}, outputs=True):
            stream.through(i)
    return seen
