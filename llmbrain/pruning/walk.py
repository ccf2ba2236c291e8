"""Walk through a model layer by layer: measure, choose, repair, go on from the repaired layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from llmbrain.architectures import Anatomy, LayerAnatomy, Projection
from llmbrain.evaluation.windows import evaluating
from llmbrain.pruning.compensation import Repair
from llmbrain.pruning.statistics import Moments
from llmbrain.pruning.streams import Stream, Taken
from llmbrain.surgery import add_bias

HELD_OUT = 8  # one batch in so many is held out to choose the ridge


@dataclass
class Site:
    """One output projection to be worked on, with the moments of its inputs (signals) and wanted outputs (targets)."""

    layer: LayerAnatomy
    output: Projection
    train: Moments
    held_out: Moments

    @property
    def all(self) -> Moments:
        """Moments of all calibration tokens."""
        return self.train + self.held_out if self.held_out.n else self.train

    @property
    def weight(self) -> Tensor:
        """``(columns, outputs)`` float64, as it is now."""
        return self.output.weight().detach().double()


@dataclass
class Change:
    """What a step did to a site: which units stay, and the new weights where there is a repair."""

    kept: Tensor
    repair: Repair | None = None


Step = Callable[[Site], Change | None]


def walk(
    model: nn.Module,
    body: Anatomy,
    windows: Tensor,
    mlp: Step,
    *,
    heads: Step | None = None,
    sequential: bool = True,
    weights: Tensor | None = None,
    progress: str | None = None,
) -> None:
    """Visit every layer in order, with the moments of calibration tokens.

    Parameters
    ----------
    windows : (n, window) int64
    mlp, heads : function of a `Site`
        What to do with the down projection, and with the attention's output projection. A returned `Change` is written
        into the weights (units that go become zero) before the walk goes on: see `restored`.
    sequential : bool
        Measure signals in the model as changed so far, with the dense model's outputs as targets; else all in the dense
        model, and changes show only at the end.
    weights : (n, window) float, optional
        How much each token counts.
    """
    with evaluating(model):
        dense = Stream(model, body, windows)
        pruned = dense.copy() if sequential else None
        token_weights = (
            None if weights is None else [w.flatten() for w in weights.split([len(h) for h in dense.hidden])]
        )
        for layer in tqdm(body.layers, desc=progress, disable=None if progress else True, leave=False):
            targets: list[Taken] = []
            after = [dense.run(i, targets.append, heads=heads is not None) for i in range(len(dense.hidden))]
            changes: list[tuple[Projection, Change]] = []
            if heads is not None and layer.out is not None and layer.heads:
                site = _measure(layer, layer.out, dense, pruned, targets, token_weights)
                _apply(heads(site), layer.out, changes, now=sequential)
            site = _measure(layer, layer.down, dense, pruned, targets, token_weights)
            _apply(mlp(site), layer.down, changes, now=sequential)
            for output, change in changes if not sequential else ():
                write(output, change)
            dense.hidden, dense.at = after, dense.at + 1
            if pruned is not None:
                pruned.advance()


def _measure(
    layer: LayerAnatomy,
    output: Projection,
    dense: Stream,
    pruned: Stream | None,
    targets: Sequence[Taken],
    weights: Sequence[Tensor] | None,
) -> Site:
    train = Moments()
    held_out: Moments | None = None
    of_heads = output is layer.out
    for i, target in enumerate(targets):
        if pruned is None:
            taken = target
        else:
            caught: list[Taken] = []
            pruned.run(i, caught.append, heads=of_heads)
            taken = caught[0]
        x, t = (taken.heads_in, target.heads_out) if of_heads else (taken.mlp_in, target.mlp_out)
        assert x is not None
        w = None if weights is None else weights[i].to(x.device)
        if i % HELD_OUT == HELD_OUT - 1 or (i == len(targets) - 1 and i > 0 and held_out is None):
            held_out = held_out or Moments(train)
            held_out.add(x, t, w)
        else:
            train.add(x, t, w)
    return Site(layer, output, train, held_out or Moments(train))


def _apply(change: Change | None, output: Projection, changes: list[tuple[Projection, Change]], *, now: bool) -> None:
    if change is not None:
        changes.append((output, change))
        if now:
            write(output, change)


def write(output: Projection, change: Change) -> None:
    """Write a change into an output projection: new columns for units that stay, zeros for those that go."""
    weight = output.weight()
    device = weight.device
    rows = output.rows(change.kept.cpu()) - output.start
    with torch.no_grad():
        if change.repair is None:
            gone = torch.ones(len(weight), dtype=torch.bool)
            gone[rows] = False
            weight[gone.to(device)] = 0
            return
        new = torch.zeros_like(weight)
        new[rows.to(device)] = change.repair.weight.to(device, weight.dtype)
        weight.copy_(new)
        if change.repair.bias is not None:
            bias = add_bias(output)
            # The repair's target is the whole output, old bias included.
            bias.copy_(change.repair.bias.to(bias.device, bias.dtype))


@contextmanager
def restored(body: Anatomy, *, heads: bool = False) -> Iterator[None]:
    """Within the block output projections may be written to; afterwards they are as before, whatever happened."""
    saved: list[tuple[Any, Tensor, Tensor | None]] = []
    for layer in body.layers:
        for output in (layer.down, layer.out if heads else None):
            if output is not None:
                bias = getattr(output.module, "bias", None)
                weight = output.module.weight
                assert isinstance(weight, Tensor)
                saved.append((output.module, weight.detach().clone(), None if bias is None else bias.detach().clone()))
    try:
        yield
    finally:
        with torch.no_grad():
            for module, weight, bias in saved:
                module.weight.copy_(weight)
                if bias is None:
                    module.bias = None
                else:
                    module.bias.copy_(bias)
