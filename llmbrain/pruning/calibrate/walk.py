"""Walk through a model layer by layer: measure, choose, repair, go on from the repaired layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from llmbrain.anatomy.families import Anatomy, LayerAnatomy, Projection
from llmbrain.anatomy.surgery import add_bias
from llmbrain.hooks.text import evaluating
from llmbrain.pruning.calibrate.moments import Moments
from llmbrain.pruning.calibrate.stream import Stream, calibration_batches
from llmbrain.pruning.repair.least_squares import Repair

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
    mlp: Step | None,
    *,
    heads: Step | None = None,
    sequential: bool = True,
    weights: Tensor | None = None,
    progress: str | None = None,
) -> None:
    """Visit every layer in order, with the moments of its signals and outputs over calibration tokens.

    Sequentially, a layer is measured in the model as changed so far: its signals are those it will get, and its target
    is what it makes of them uncut. (Targets from the dense model, whose inputs differ, were worse: at 50% on
    `stories260K` 18.5 without a sequence and about as much with the dense output as target, 17.3 with this one.)

    Parameters
    ----------
    windows : (n, window) int64
    mlp, heads : function of a `Site`
        What to do with the down projection, and with the attention's output projection; None is not measured. A
        returned `Change` is written into the weights (units that go become zero): see `restored`.
    sequential : bool
        Whether later layers see the changes to earlier ones.
    weights : (n, window) float, optional
        How much each token counts.
    """
    with evaluating(model):
        stream = Stream(model, body, windows)
        sizes = [len(h) for h in stream.hidden]
        token_weights = None if weights is None else [w.flatten() for w in weights.split(sizes)]
        late: list[tuple[Projection, Change]] = []
        for layer in tqdm(body.layers, desc=progress, disable=None if progress else True, leave=False):
            unchanged = None
            for output, step in ((layer.out, heads), (layer.down, mlp)):
                if output is None or step is None:
                    continue
                site, after = _measure(stream, output, token_weights)
                change = step(site)
                unchanged = after if change is None else None
                if change is not None and sequential:
                    write(output, change)
                elif change is not None:
                    late.append((output, change))
                    unchanged = after
            stream.advance(unchanged)
        for output, change in late:
            write(output, change)


def is_held_out(batch: int, n: int) -> bool:
    """Whether a batch of n serves to choose the ridge and the allocation: every eighth, or the last of fewer."""
    return batch % HELD_OUT == HELD_OUT - 1 or (n < HELD_OUT and batch == n - 1 > 0)


def split_windows(windows: Tensor) -> tuple[Tensor, Tensor]:
    """The windows of held-out and of training batches (all of them twice where there is only one batch)."""
    parts = calibration_batches(windows)
    if len(parts) < 2:
        return windows, windows
    held = [part for i, part in enumerate(parts) if is_held_out(i, len(parts))]
    train = [part for i, part in enumerate(parts) if not is_held_out(i, len(parts))]
    return torch.cat(held), torch.cat(train)


def _measure(stream: Stream, output: Projection, weights: Sequence[Tensor] | None) -> tuple[Site, list[Tensor]]:
    """Moments of one output projection in block `stream.at`, and the hidden states after the block."""
    layer = stream.layers[stream.at]
    train = Moments()
    held_out: Moments | None = None
    after = []
    n = len(stream.hidden)
    for i in range(n):
        (x, t), hidden = stream.run(i, output)
        after.append(hidden)
        w = None if weights is None else weights[i].to(x.device)
        if is_held_out(i, n):
            held_out = held_out or Moments(train)
            held_out.add(x, t, w)
        else:
            train.add(x, t, w)
    return Site(layer, output, train, held_out or Moments(train)), after


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
        if change.repair.bias is not None:  # the target is the whole output, old bias included
            bias = add_bias(output)
            bias.copy_(change.repair.bias.to(bias.device, bias.dtype))


@contextmanager
def restored(layers: Sequence[LayerAnatomy], *, heads: bool = False) -> Iterator[None]:
    """Within the block output projections may be written to; afterwards they are as before, whatever happened."""
    saved: list[tuple[Any, Tensor, Tensor | None]] = []
    for layer in layers:
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
