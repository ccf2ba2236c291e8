"""Sites: what can be recorded, and where in a model it passes."""

from __future__ import annotations

from collections.abc import Sequence
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
