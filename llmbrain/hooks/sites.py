"""Sites: what can be recorded, and where in a model it passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError, check_names
from llmbrain.anatomy.experts import ExpertAnatomy
from llmbrain.anatomy.families import Anatomy, LayerAnatomy
from llmbrain.anatomy.layers import sizes
from llmbrain.anatomy.units import HEADS, NEURONS

SITES = ("neuron", "gate", "up", "mlp_out", "block_out", "head", "router")
"""Input of the down projection; its two factors (activated gate, up); output of the down projection; output of the
block; L2 norm of each attention head's output (its slice of the output projection's input); of a mixture of experts,
what the output of each routed expert is multiplied with (its gate, zero where it is not called)."""

_OF_MLP = ("neuron", "gate", "up", "mlp_out")
OF_EXPERTS = ("neuron", "router", "block_out")
"""Sites that a mixture of experts has."""
BY_VISIT = ("shared", "visited", "weight", "routed")
"""How the neurons and gates of a mixture of experts are stored, by token: neurons of the MLP that every token passes;
which experts were called (int32, -1: none); their gates; their neurons, one called expert after the other."""


@dataclass(frozen=True)
class Tap:
    """One place to listen: the input or output of a module, entries ``start..start + width`` of its last axis."""

    site: str
    layer: int
    module: nn.Module
    output: bool
    start: int = 0
    width: int | None = None
    head_size: int = 0
    by_visit: bool = False
    silent: bool = False  # of a part that was dropped: it is not run, and says zeros of this `width`

    def read(self, value: Any) -> Tensor:
        """The signal in what the module got or gave; units on the last axis."""
        while not isinstance(value, Tensor):  # some blocks give a tuple, hidden states first
            value = value[0]
        if self.head_size:
            return torch.linalg.vector_norm(value.unflatten(-1, (-1, self.head_size)), dim=-1, dtype=torch.float32)
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
    sites = check_names("site", site)
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


def expert_taps(body: ExpertAnatomy, sites: Sequence[str]) -> list[Tap]:
    """Where to listen in a mixture of experts; neurons and gates are heard as `BY_VISIT` says.

    Raises
    ------
    InputError
        If a site does not exist in it.
    """
    for site in sites:
        if site not in OF_EXPERTS:
            raise InputError(
                f"site={site!r} is not recorded of a mixture of experts ({body.family}): allowed are "
                f"{', '.join(map(repr, OF_EXPERTS))}"
            )
    taps = [
        Tap("shared", layer.index, mlp.down.module, output=False)
        for layer in body.layers for mlp in layer.shared if "neuron" in sites
    ]  # fmt: skip
    kinds = BY_VISIT[1:] if "neuron" in sites else BY_VISIT[1:3] if "router" in sites else ()
    taps += [Tap(kind, i, routed.module, output=True, by_visit=True) for kind in kinds for i, routed in body.routed]
    if "block_out" in sites:
        taps += [Tap("block_out", layer.index, layer.block, output=True) for layer in body.layers]
    return taps


def _tap(site: str, layer: LayerAnatomy, family: str) -> Tap:
    i = layer.index
    if site in _OF_MLP and NEURONS.is_gone(layer):
        width = sizes(layer.down.module)[1] if site == "mlp_out" else 0
        return Tap(site, i, layer.down.module, output=True, width=width, silent=True)
    if site == "head" and HEADS.is_gone(layer) and layer.out is not None:
        return Tap(site, i, layer.out.module, output=True, width=0, silent=True)
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
        return Tap(site, i, layer.out.module, output=False, head_size=sizes(layer.out.module)[0] // layer.n_heads)
    reason = {"gate": "its MLP is not gated", "router": "it is no mixture of experts"}.get(
        site, "its attention heads could not be found"
    )
    raise InputError(f"site={site!r} does not exist in layer {i} of this model ({family}): {reason}")
