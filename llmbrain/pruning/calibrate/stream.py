"""Calibration text on its way through a model, one block at a time.

A `Stream` holds the hidden states of the calibration windows between two blocks. Measuring a block and going on through
the changed block costs two block passes, so a whole sequential calibration costs two forward passes, not one per layer;
and where only the MLP was changed, the second needs no attention. What is held is tokens x hidden size, twice; signals
of neurons (tokens x width) never are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.families import Anatomy, Projection
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

        def keep(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            # The output is copied: Falcon adds to it in place afterwards.
            caught.append((args[0].detach().flatten(0, -2), out.detach().flatten(0, -2).clone()))

        def attended(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self._attended[batch] = out.clone() if isinstance(out, Tensor) else (out[0].clone(), *[None] * len(out[1:]))

        layer = self.layers[self.at]
        self._attended.pop(batch, None)
        handles = [output.module.register_forward_hook(keep)]
        if output is layer.down and layer.attention is not None:
            handles.append(layer.attention.register_forward_hook(attended))
        try:
            hidden = self._through(batch)
        finally:
            for handle in handles:
                handle.remove()
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
        with nullcontext() if known is None or layer.attention is None else _saying(layer.attention, known):
            return _tensor(layer.block(hidden, *args, **kwargs))


@contextmanager
def _saying(module: nn.Module, output: Any) -> Iterator[None]:
    """Within the block a module says this and computes nothing."""
    before = vars(module).get("forward")
    vars(module)["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


def _record_calls(model: nn.Module, body: Anatomy, batch: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments, beside the hidden states, that each block gets in a real forward pass of this batch size."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        if not args:
            kwargs.pop("hidden_states", None)
        for name in kwargs:
            if "past_key_value" in name or name in ("layer_past", "cache_params"):
                kwargs[name] = None
        calls.append((args[1:], kwargs))

    handles = [layer.block.register_forward_pre_hook(keep, with_kwargs=True) for layer in body.layers]
    try:
        with evaluating(model):
            model(input_ids=batch.to(input_device(model)), **_no_cache(model))
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) != len(body.layers):
        raise InputError(f"model {type(model).__name__} ran {len(calls)} of {len(body.layers)} blocks in one pass")
    return calls


def _before_first_block(model: nn.Module, body: Anatomy, batch: Tensor) -> Tensor:
    caught: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])
        raise _FirstBlockReached

    handle = body.layers[0].block.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with evaluating(model):
            model(input_ids=batch.to(input_device(model)), **_no_cache(model))
    except _FirstBlockReached:
        return caught[0]
    finally:
        handle.remove()
    raise InputError(f"model {type(model).__name__} did not run its first block")


def _no_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
