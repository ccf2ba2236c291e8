"""Calibration text on its way through a mixture of experts, one block at a time.

As `llmbrain.pruning.calibrate.stream.walk`, with every expert as an MLP of its own that sees only the tokens which call
it. What an expert gives is multiplied with its gate, so a token counts with the square of it: the squared error of the
sum. Neurons are about zero where the output has no bias that could take a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmbrain._progress import bar
from llmbrain.anatomy.expert_parts import Part, parts_of
from llmbrain.anatomy.experts import ExpertAnatomy, ExpertLayer
from llmbrain.anatomy.surgery import Change, write
from llmbrain.anatomy.units import NEURONS
from llmbrain.hooks.experts import Listen, Visits, hearing_experts
from llmbrain.hooks.listen import hear_outputs
from llmbrain.hooks.text import evaluating
from llmbrain.pruning.calibrate.moments import Moments
from llmbrain.pruning.calibrate.stream import Measured, Stream, WholePasses, is_held_out, stream_of


@dataclass
class MeasuredPart:
    """An expert, or an MLP that every token passes, with the moments of its neurons and of what it gives.

    Attributes
    ----------
    part : Part
    calls : int
        Tokens that called it.
    measured : Measured or None
        As of a dense model's MLP, tokens weighted with the square of their gate; None where it was never called.
    """

    part: Part
    calls: int
    measured: Measured | None


Step = Callable[[ExpertLayer, list[MeasuredPart]], Sequence[Change | None]]


def walk_mixture(
    model: nn.Module,
    body: ExpertAnatomy,
    windows: Tensor,
    step: Step,
    *,
    sequential: bool = True,
    weights: Tensor | None = None,
    progress: str | None = None,
) -> None:
    """Visit every layer in order, with the moments of its experts over calibration tokens.

    Parameters
    ----------
    windows : (n, window) int64
    step : function of an ExpertLayer and its `MeasuredPart`s
        Gives what becomes of the down projection of each, or None; it is written into the weights.
    sequential : bool
        Whether later layers see the changes to earlier ones.
    weights : (n, window) float, optional
        How much each token counts.
    """
    with evaluating(model):
        stream = stream_of(model, body, windows)
        token_weights = weights_by_batch(stream, weights)
        late: list[tuple[Part, Change]] = []
        for layer in bar(body.layers, desc=progress or "layers", show=bool(progress), leave=False):
            measured, after = _measure(stream, layer, token_weights)
            changes = [(m.part, c) for m, c in zip(measured, step(layer, measured)) if c is not None]
            if sequential:
                for part, change in changes:
                    write(part.mlp.down, change)
            else:
                late += changes
            stream.advance(None if changes and sequential else after)
        for part, change in late:
            write(part.mlp.down, change)


def weights_by_batch(stream: Stream | WholePasses, weights: Tensor | None) -> list[Tensor] | None:
    """How much each token of each batch of a stream counts, ``(tokens,)`` a batch."""
    if weights is None:
        return None
    return [w.flatten() for w in weights.split([len(h) for h in stream.hidden])]


def _measure(
    stream: Stream | WholePasses, layer: ExpertLayer, weights: list[Tensor] | None
) -> tuple[list[MeasuredPart], list[Tensor]]:
    """Moments of the parts of block `stream.at`, and the hidden states after it."""
    parts = parts_of(layer)
    train: dict[int, Moments] = {}
    held: dict[int, Moments] = {}
    calls = [0] * len(parts)
    n, after = len(stream.hidden), list[Tensor]()
    for i in range(n):
        into = held if is_held_out(i, n) else train
        counts = None if weights is None else weights[i]

        def take(place: int, x: Tensor, t: Tensor, w: Tensor | None, into: dict[int, Moments] = into) -> None:
            calls[place] += len(x)
            if place not in into:
                into[place] = Moments.about_zero(x.shape[1], t.shape[1], x.device)
            into[place].add(x, t, w)

        with hearing_parts(layer, parts, take, counts):
            after.append(stream.through(i))
    measured = []
    for place, part in enumerate(parts):
        first, second = train.get(place), held.get(place)
        if first is None:
            first, second = second, None
        found = None if first is None else Measured(part.mlp, NEURONS, part.mlp.down, first, second or Moments(first))
        measured.append(MeasuredPart(part, calls[place], found))
    return measured, after


Take = Callable[[int, Tensor, Tensor, Tensor | None], None]
"""Gets the place of a part, its neurons, what it gave (before its gate), and how much each of these tokens counts."""


@contextmanager
def hearing_parts(layer: ExpertLayer, parts: Sequence[Part], take: Take, weights: Tensor | None) -> Iterator[None]:
    """Within the block every part of a layer is heard at each call; `weights` ``(tokens,)`` are of the tokens."""
    shared = [(i, p) for i, p in enumerate(parts) if p.routed is None]

    def mlp(place: int) -> Callable[[Tensor, Tensor], None]:
        def hear(entering: Tensor, out: Tensor) -> None:
            x, t = entering.detach().flatten(0, -2), out.detach().flatten(0, -2).clone()
            take(place, x, t, None if weights is None else weights.to(x.device))

        return hear

    def routed(visits: Visits) -> None:
        assert visits.outputs is not None
        for place, part in enumerate(parts):
            if part.routed is None:
                continue
            token, at = torch.where(visits.experts == part.routed)
            if not len(token):
                continue
            gate = visits.weights[token, at].float().square()
            if weights is not None:
                gate = gate * weights.to(gate)[token]
            take(place, visits.neurons[token, at], visits.outputs[token, at], gate)

    with ExitStack() as stack:
        stack.enter_context(hear_outputs(None, [(p.mlp.down.module, mlp(i)) for i, p in shared]))
        if layer.routed is not None:
            places: Mapping[nn.Module, Listen] = {layer.routed.module: routed}
            stack.enter_context(hearing_experts(places, outputs=True))
        yield
