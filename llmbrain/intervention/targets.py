"""What an intervention acts on: networks, masks, lists of neurons or heads, as inputs of linear layers.

A neuron is an input of its layer's down projection; a head is a run of inputs of the attention's output projection.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.families import Anatomy, anatomy
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.networks import FunctionalNetworks, Network


class Heads:
    """Attention heads to act on, as (layer, head) pairs; heads are counted as queries are.

    Examples
    --------
    >>> Heads([(0, 3), (1, 0)])
    Heads([(0, 3), (1, 0)])
    """

    def __init__(self, heads: Sequence[tuple[int, int]]) -> None:
        self.heads = [(int(layer), int(head)) for layer, head in _pairs(heads, "Heads").tolist()]

    def __repr__(self) -> str:
        return f"Heads({self.heads})"


@dataclass(frozen=True)
class Part:
    """Some inputs of one linear layer: `chosen` is bool, one entry an input (the last axis of what enters `module`)."""

    layer: int
    module: nn.Module
    path: str
    chosen: Tensor

    @property
    def positions(self) -> Tensor:
        """Where the chosen inputs lie on the last axis."""
        return self.chosen.nonzero()[:, 0]


def neuron_mask(what: Any, space: NeuronSpace, name: str = "what") -> NDArray[np.bool_]:
    """The neurons that `what` names, as a bool mask ``(n_neurons,)`` over `space`.

    Parameters
    ----------
    what : Network, FunctionalNetworks, list of Network, bool mask, flat indices, (layer, neuron) pairs, or DataFrame
        Several networks mean their union. Flat indices are an int array ``(n,)``, pairs ``(n, 2)``; a DataFrame has the
        columns layer and neuron (as `key_neurons` gives it).

    Raises
    ------
    InputError
        If `what` lies in another space, or names a neuron that does not exist.
    """
    if isinstance(what, (Network, FunctionalNetworks)):
        _check_space(
            what.space, int(what.maps.shape[1] if isinstance(what, FunctionalNetworks) else what.mask.size), space
        )
        return what.mask.copy() if isinstance(what, Network) else what.union.copy()
    if isinstance(what, (list, tuple)) and what and all(isinstance(n, (Network, FunctionalNetworks)) for n in what):
        return np.any([neuron_mask(n, space, name) for n in what], axis=0)
    if hasattr(what, "columns"):
        missing = {"layer", "neuron"} - set(what.columns)
        if missing:
            raise InputError(f"{name} is a table without the columns {sorted(missing)}: it needs layer and neuron")
        what = what[["layer", "neuron"]].to_numpy(dtype=np.int64)
    if isinstance(what, Tensor):
        what = what.detach().cpu().numpy()
    try:
        values = np.asarray(what)
    except ValueError:
        values = np.empty(0, dtype=object)
    if values.dtype == bool:
        if values.shape != (space.n_neurons,):
            raise InputError(f"{name} is a mask of shape {values.shape}: it must be ({space.n_neurons},), as {space}")
        return values.copy()
    mask = np.zeros(space.n_neurons, dtype=bool)
    if values.size == 0 and values.dtype != object:
        return mask
    if values.dtype.kind not in "iu" or values.ndim > 2 or (values.ndim == 2 and values.shape[1] != 2):
        raise InputError(
            f"{name}={_brief(what)} is no set of neurons: pass a Network, FunctionalNetworks, a bool mask "
            f"({space.n_neurons},), flat indices, (layer, neuron) pairs, a table with layer and neuron, or Heads"
        )
    mask[space.index(values[:, 0], values[:, 1]) if values.ndim == 2 else _flat(values, space)] = True
    return mask


def unit_space(body: Anatomy) -> NeuronSpace:
    """Neurons of every layer, then heads of every layer, one after the other, as one space.

    "Layer" ``n_layers + i`` of it holds the heads of layer ``i`` (none where no heads were found).
    """
    return NeuronSpace([*body.widths, *(layer.n_heads if layer.out is not None else 0 for layer in body.layers)])


def spans_heads(what: Any, body: Anatomy) -> bool:
    """Whether `what` is made of networks of neurons and heads together (from `Scan.joined`), in `unit_space`."""
    parts = list(what) if isinstance(what, (list, tuple)) and what else [what]
    units = unit_space(body)
    return units.n_neurons > sum(body.widths) and all(
        isinstance(part, (Network, FunctionalNetworks)) and part.space == units for part in parts
    )


def unit_mask(what: Any, body: Anatomy, name: str = "what") -> NDArray[np.bool_]:
    """The neurons and heads that `what` names, as a bool mask over `unit_space`."""
    units, space = unit_space(body), NeuronSpace(body.widths)
    if spans_heads(what, body):
        return neuron_mask(what, units, name)
    mask = np.zeros(units.n_neurons, dtype=bool)
    if isinstance(what, Heads):
        _check_heads(body, what)
        for layer, head in what.heads:
            mask[units.layer_slice(space.n_layers + layer).start + head] = True
    else:
        mask[: space.n_neurons] = neuron_mask(what, space, name)
    return mask


def find_parts(model: nn.Module, what: Any, *, complement: bool = False) -> list[Part]:
    """Where `what` enters the linear layers of `model`; with `complement`, all other units of that kind.

    Heads and neurons are different kinds: the complement of neurons holds no head, and the other way round; networks
    that span both have both. An empty choice is allowed and said by a warning.
    """
    body = anatomy(model)
    both = spans_heads(what, body)
    mask, n = unit_mask(what, body), sum(body.widths)
    mask = ~mask if complement else mask
    parts = [] if isinstance(what, Heads) else neuron_parts(body, mask[:n])
    parts += _head_parts(body, mask) if both or isinstance(what, Heads) else []
    if not parts:
        reason = "names every unit, so there is nothing else" if complement else "holds no neuron"
        warnings.warn(f"{_brief(what)} {reason}: the model is unchanged", UserWarning, stacklevel=3)
    return parts


def neuron_parts(body: Anatomy, mask: NDArray[np.bool_]) -> list[Part]:
    """The neurons of a mask ``(n_neurons,)``, layer by layer; layers without any are left out."""
    space = NeuronSpace(body.widths)
    parts = []
    for layer in body.layers:
        units = np.flatnonzero(mask[space.layer_slice(layer.index)])
        if len(units):
            chosen = torch.zeros(layer.width, dtype=torch.bool)
            chosen[layer.down.rows(torch.from_numpy(units))] = True
            parts.append(Part(layer.index, layer.down.module, layer.down.path, chosen))
    return parts


def _check_heads(body: Anatomy, what: Heads) -> None:
    for layer, head in what.heads:
        if not 0 <= layer < len(body.layers):
            raise InputError(f"what={what}: layer={layer} does not exist: allowed are 0 to {len(body.layers) - 1}")
        place = body.layers[layer]
        if place.out is None:
            raise InputError(f"what={what}: no heads were found in layer {layer} of this {body.family} model")
        if not 0 <= head < place.n_heads:
            raise InputError(f"what={what}: head={head} does not exist in layer {layer}: it has {place.n_heads}")


def _head_parts(body: Anatomy, mask: NDArray[np.bool_]) -> list[Part]:
    """The heads of a mask over `unit_space`; layers without any are left out."""
    units, parts = unit_space(body), []
    for layer in body.layers:
        heads = torch.from_numpy(mask[units.layer_slice(len(body.layers) + layer.index)])
        if layer.out is not None and heads.any():
            chosen = heads.repeat_interleave(layer.head_dim)
            parts.append(Part(layer.index, layer.out.module, layer.out.path, chosen))
    return parts


def _check_space(own: NeuronSpace | None, n_neurons: int, space: NeuronSpace) -> None:
    if own is not None and own != space:
        raise InputError(f"the network lies in {own}, the model has {space}: find networks in a scan of this model")
    if n_neurons != space.n_neurons:
        raise InputError(f"the network covers {n_neurons} neurons, the model has {space}")


def _flat(values: NDArray[Any], space: NeuronSpace) -> NDArray[np.int64]:
    space.locate(values)  # names an index that does not exist
    return values.astype(np.int64)


def _pairs(values: Any, name: str) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.size == 0:
        return np.zeros((0, 2), dtype=np.int64)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        raise InputError(f"{name}({_brief(values)}) must hold pairs of whole numbers")
    return array.astype(np.int64)


def _brief(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
