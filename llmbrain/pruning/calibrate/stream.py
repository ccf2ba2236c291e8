"""Calibration text on its way through a model, one block at a time.

A `Stream` holds the hidden states of the calibration windows between two blocks. Measuring a block and going on through
the changed block costs two block passes, so a whole sequential calibration costs two forward passes, not one per layer;
and where only the MLP was changed, the second needs no attention. What is held is tokens x hidden size, twice; signals
of neurons (tokens x width) never are.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.families import Anatomy, Projection
from llmbrain.hooks.change import saying
from llmbrain.hooks.listen import Call, hear_calls, hear_outputs
from llmbrain.hooks.text import BATCH_TOKENS, batches, evaluating, input_device

LEAST_BATCHES = 8


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
