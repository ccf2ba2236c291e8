"""Calibration text on its way through a model, one block at a time.

A `Stream` holds the hidden states of the calibration windows between two blocks. Running the dense and the pruned model
side by side through one block costs two block passes, so a whole sequential calibration costs about three forward
passes, not one per layer. What is held is tokens x hidden size; signals of neurons (tokens x width) never are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.architectures import Anatomy, LayerAnatomy
from llmbrain.evaluation.windows import batches, evaluating, input_device


class _FirstBlockReached(Exception):
    """Raised by our own hook to end a forward pass before the first block."""


@dataclass
class Taken:
    """What a block did to one batch: input and output of the down projection, and of the attention's output projection.

    All of shape ``(tokens, units)``, in the model's dtype; None where not asked for.
    """

    mlp_in: Tensor
    mlp_out: Tensor
    heads_in: Tensor | None = None
    heads_out: Tensor | None = None


class Stream:
    """Hidden states of windows, batch by batch, before block `at`."""

    def __init__(self, model: nn.Module, body: Anatomy, windows: Tensor) -> None:
        self.layers = body.layers
        self.at = 0
        self.hidden: list[Tensor] = []
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}  # by batch size, one a block
        for batch in batches(windows):
            if len(batch) not in self._calls:
                self._calls[len(batch)] = _record_calls(model, body, batch)
            self.hidden.append(_before_first_block(model, body, batch))

    def copy(self) -> Stream:
        """A second stream at the same place (tensors are shared: they are never changed in place)."""
        other = object.__new__(Stream)
        other.layers, other.at, other._calls, other.hidden = self.layers, self.at, self._calls, list(self.hidden)
        return other

    def run(self, batch: int, take: Callable[[Taken], None] | None = None, *, heads: bool = False) -> Tensor:
        """Put one batch through block `at` as it is now; `take` sees what the MLP (and the heads) did."""
        layer, hidden = self.layers[self.at], self.hidden[batch]
        args, kwargs = self._calls[len(hidden)][self.at]
        if take is None:
            return _tensor(layer.block(hidden, *args, **kwargs))
        with listening(layer, heads=heads) as caught:
            out = _tensor(layer.block(hidden, *args, **kwargs))
        take(Taken(*caught["mlp"], *caught.get("heads", (None, None))))
        return out

    def advance(self, take: Callable[[Taken], None] | None = None) -> None:
        """Go on to the next block, with the block's weights as they are now."""
        self.hidden = [self.run(i, take) for i in range(len(self.hidden))]
        self.at += 1


@contextmanager
def listening(layer: LayerAnatomy, *, heads: bool = False) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Keep what enters and leaves the down projection (and the heads' output projection) in the next forward pass."""
    caught: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            # Falcon adds to this output in place afterwards.
            caught[name] = (args[0].detach().flatten(0, -2), output.detach().flatten(0, -2).clone())

        return hook

    handles = [layer.down.module.register_forward_hook(keep("mlp"))]
    if heads and layer.out is not None:
        handles.append(layer.out.module.register_forward_hook(keep("heads")))
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


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
