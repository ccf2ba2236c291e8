"""Sites: what can be recorded, where in a model it passes, and the hooks that listen there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.families import Anatomy, LayerAnatomy

SITES = ("neuron", "gate", "up", "mlp_out", "block_out", "head")
"""Input of the down projection; its two factors (activated gate, up); output of the down projection; output of the
block; L2 norm of each attention head's output (its slice of the output projection's input)."""


@dataclass(frozen=True)
class Tap:
    """One place to listen: the input or output of a module, entries ``start..start + width`` of its last axis."""

    site: str
    layer: int
    module: nn.Module
    output: bool
    start: int = 0
    width: int | None = None
    heads: int = 0

    def read(self, value: Any) -> Tensor:
        """The signal in what the module got or gave; units on the last axis."""
        while not isinstance(value, Tensor):  # some blocks give a tuple, hidden states first
            value = value[0]
        if self.heads:
            return torch.linalg.vector_norm(value.unflatten(-1, (self.heads, -1)), dim=-1, dtype=torch.float32)
        if self.width is not None and self.width != value.shape[-1]:
            value = value[..., self.start : self.start + self.width]
        return value


def check_sites(site: str | Sequence[str]) -> tuple[str, ...]:
    """Site names as a tuple without repeats.

    Raises
    ------
    InputError
        If one is not known or none is given.
    """
    sites = (site,) if isinstance(site, str) else tuple(dict.fromkeys(site))
    for name in sites or (None,):
        if name not in SITES:
            raise InputError(f"site={name!r} is not known: allowed are {', '.join(map(repr, SITES))}, or several")
    return sites


def find_taps(anatomy: Anatomy, sites: Sequence[str]) -> list[Tap]:
    """Where to listen for each site in each layer.

    Raises
    ------
    InputError
        If a site does not exist in this model, naming the layer.
    """
    return [_tap(site, layer, anatomy.family) for site in sites for layer in anatomy.layers]


def _tap(site: str, layer: LayerAnatomy, family: str) -> Tap:
    i = layer.index
    if site == "neuron":
        return Tap(site, i, layer.down.module, output=False)
    if site == "mlp_out":
        return Tap(site, i, layer.down.module, output=True)
    if site == "block_out":
        return Tap(site, i, layer.block, output=True)
    if site == "up":
        up = layer.inputs[-1]
        return Tap(site, i, up.module, output=True, start=up.start, width=up.units)
    if site == "gate" and layer.gated and layer.act is not None:
        return Tap(site, i, layer.act, output=True)
    if site == "head" and layer.out is not None and layer.n_heads:
        return Tap(site, i, layer.out.module, output=False, heads=layer.n_heads)
    reason = "its MLP is not gated" if site == "gate" else "its attention heads could not be found"
    raise InputError(f"site={site!r} does not exist in layer {i} of this model ({family}): {reason}")


class Recorder:
    """Listens at `taps`; what it hears goes to `buffers` on the CPU, real tokens only.

    A buffer that is given is filled at the rows of the batch; one that is not is made. The hooks copy at once, since
    some models change a module's output in place afterwards (Falcon).
    """

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.taps = taps
        self.buffers: dict[tuple[str, int], Tensor] = {}
        self.n_rows = self.n_cells = 0
        self._keep: Tensor | None = None
        self._keep_on: dict[torch.device, Tensor] = {}
        self._rows = slice(0)
        self._heard: Counter[tuple[str, int]] = Counter()

    def expect(self, mask: Tensor, first_row: int) -> None:
        """Prepare for one forward pass over a batch whose real tokens are `mask` (bool, CPU)."""
        self.n_cells, self.n_rows = mask.numel(), int(mask.sum())
        self._keep = None if self.n_rows == self.n_cells else mask.flatten().nonzero()[:, 0]
        self._rows = slice(first_row, first_row + self.n_rows)
        self._heard, self._keep_on = Counter(), {}

    @contextmanager
    def listening(self) -> Iterator[Recorder]:
        """Hooks are there inside, and gone afterwards whatever happens."""
        handles = []
        try:
            for tap in self.taps:
                handles.append(self._attach(tap))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, tap: Tap) -> Any:
        if tap.output:
            return tap.module.register_forward_hook(lambda module, args, out: self._hear(tap, out))
        return tap.module.register_forward_pre_hook(lambda module, args: self._hear(tap, args))

    def _hear(self, tap: Tap, value: Any) -> None:
        signal = tap.read(value)
        signal = signal.reshape(-1, signal.shape[-1])
        if signal.shape[0] == self.n_cells:
            if self._keep is not None:
                keep = self._keep_on.setdefault(signal.device, self._keep.to(signal.device))
                signal = signal.index_select(0, keep)
        elif signal.shape[0] != self.n_rows:  # models that drop the padding themselves give the real tokens only
            raise InputError(
                f"site={tap.site!r}, layer {tap.layer}: {signal.shape[0]} rows for {self.n_cells} tokens: "
                "this module does not see one row a token"
            )
        key = (tap.site, tap.layer)
        self._heard[key] += 1
        if key in self.buffers:
            self.buffers[key][self._rows].copy_(signal)
        else:
            self.buffers[key] = signal.to("cpu", copy=True)

    def check_heard(self) -> None:
        """Every tap must have been passed exactly once."""
        for site, layer in ((tap.site, tap.layer) for tap in self.taps):
            times = self._heard[site, layer]
            if times != 1:
                raise InputError(
                    f"site={site!r}: layer {layer} ran {times} times in one forward pass, and can not be recorded"
                )
