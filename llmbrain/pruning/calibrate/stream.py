"""Calibration text on its way through a model, one block at a time: measure, choose, repair, go on.

A `Stream` holds the hidden states of the calibration windows between two blocks. Measuring a block and going on through
the changed block costs two block passes, so a whole sequential calibration costs two forward passes, not one per layer;
and where only the MLP was changed, the second needs no attention. What is held is tokens x hidden size, twice; signals
of neurons (tokens x width) never are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmbrain._progress import bar
from llmbrain._validation import InputError
from llmbrain.anatomy.families import Anatomy, LayerAnatomy, Projection
from llmbrain.anatomy.surgery import Change, write
from llmbrain.anatomy.units import KINDS, Units
from llmbrain.hooks.change import saying
from llmbrain.hooks.listen import Call, hear_calls, hear_outputs
from llmbrain.hooks.text import BATCH_TOKENS, batches, evaluating, input_device
from llmbrain.pruning.calibrate.moments import Moments

LEAST_BATCHES = 8
HELD_OUT = 8  # one batch in so many is held out to choose the ridge


class _FirstBlockReached(Exception):
    """Raised by our own hook to end a forward pass before the first block."""


def calibration_batches(windows: Tensor) -> tuple[Tensor, ...]:
    """Windows in batches; little text in smaller ones, so that some can be held out."""
    return batches(windows, min(BATCH_TOKENS, -(-windows.numel() // LEAST_BATCHES)))


class Stream:
    """Hidden states of windows, batch by batch, before block `at`."""

    def __init__(self, model: nn.Module, body: Anatomy, windows: Tensor) -> None:
        self.layers = body.layers
        self.at = 0
        self.hidden: list[Tensor] = []
        self._attended: dict[int, Any] = {}  # by batch: what the attention of block `at` said
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}  # by batch size, one a block
        for batch in calibration_batches(windows):
            if len(batch) not in self._calls:
                self._calls[len(batch)] = _record_calls(model, body, batch)
            self.hidden.append(_before_first_block(model, body, batch))

    def run(self, batch: int, output: Projection) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Put one batch through block `at` as it is now, and listen at one of its output projections.

        Returns
        -------
        ((tokens, columns), (tokens, outputs)), hidden states after the block
        """
        caught: list[tuple[Tensor, Tensor]] = []

        def keep(entering: Tensor, out: Tensor) -> None:
            # The output is copied: Falcon adds to it in place afterwards.
            caught.append((entering.detach().flatten(0, -2), out.detach().flatten(0, -2).clone()))

        def attended(entering: Any, out: Any) -> None:
            self._attended[batch] = out.clone() if isinstance(out, Tensor) else (out[0].clone(), *[None] * len(out[1:]))

        layer = self.layers[self.at]
        self._attended.pop(batch, None)
        places: list[tuple[nn.Module, Any]] = [(output.module, keep)]
        if output is layer.down and layer.attention is not None:
            places.append((layer.attention, attended))
        with hear_outputs(None, places):
            hidden = self._through(batch)
        return caught[0], hidden

    def advance(self, hidden: list[Tensor] | None = None) -> None:
        """Go on to the next block: with hidden states that are known, or through the block as it is now.

        Its attention must be as it was when the down projection was listened to.
        """
        self.hidden = [self._through(i) for i in range(len(self.hidden))] if hidden is None else hidden
        self._attended.clear()
        self.at += 1

    def _through(self, batch: int) -> Tensor:
        hidden, layer = self.hidden[batch], self.layers[self.at]
        args, kwargs = self._calls[len(hidden)][self.at]
        known = self._attended.pop(batch, None)
        with nullcontext() if known is None or layer.attention is None else saying(layer.attention, known):
            return _tensor(layer.block(hidden, *args, **kwargs))


def _record_calls(model: nn.Module, body: Anatomy, batch: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments, beside the hidden states, that each block gets in a real forward pass of this batch size."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(call: Call) -> None:
        kwargs = dict(call.kwargs)
        if not call.args:
            kwargs.pop("hidden_states", None)
        for name in kwargs:
            if "past_key_value" in name or name in ("layer_past", "cache_params"):
                kwargs[name] = None
        calls.append((call.args[1:], kwargs))

    with evaluating(model), hear_calls(None, [(layer.block, keep) for layer in body.layers]):
        model(input_ids=batch.to(input_device(model)))
    if len(calls) != len(body.layers):
        raise InputError(f"model {type(model).__name__} ran {len(calls)} of {len(body.layers)} blocks in one pass")
    return calls


def _before_first_block(model: nn.Module, body: Anatomy, batch: Tensor) -> Tensor:
    caught: list[Tensor] = []

    def keep(call: Call) -> None:
        caught.append(call.entering)
        raise _FirstBlockReached

    with evaluating(model), suppress(_FirstBlockReached), hear_calls(None, [(body.layers[0].block, keep)]):
        model(input_ids=batch.to(input_device(model)))
    if caught:
        return caught[0]
    raise InputError(f"model {type(model).__name__} did not run its first block")


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@dataclass
class Measured:
    """An output projection to be worked on, with the moments of its inputs (signals) and wanted outputs (targets)."""

    layer: LayerAnatomy
    units: Units
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


Step = Callable[[Measured], Change | None]


def walk(
    model: nn.Module,
    body: Anatomy,
    windows: Tensor,
    steps: Mapping[Units, Step],
    *,
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
    steps : mapping of Units to a function of a `Measured`
        What to do with the projection that units of a kind enter; other kinds are not measured. A returned `Change` is
        written into the weights (units that go become zero): see `llmbrain.anatomy.surgery.restored`.
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
        for layer in bar(body.layers, desc=progress or "layers", show=bool(progress), leave=False):
            unchanged = None
            for units in (kind for kind in KINDS if kind in steps):
                output = units.output(layer)
                if output is None:
                    continue
                measured, after = _measure(stream, units, output, token_weights)
                change = steps[units](measured)
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


def _measure(
    stream: Stream, units: Units, output: Projection, weights: list[Tensor] | None
) -> tuple[Measured, list[Tensor]]:
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
    return Measured(layer, units, output, train, held_out or Moments(train)), after
