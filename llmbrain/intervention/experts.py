"""Lesions of a mixture of experts: of neurons inside experts, and of whole experts; and controls for the latter."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from llmbrain._validation import InputError, seed_of
from llmbrain.anatomy.expert_surgery import check_kept
from llmbrain.anatomy.experts import ExpertAnatomy, expert_anatomy
from llmbrain.hooks.change import Edit, Intervention, scale, zero
from llmbrain.hooks.experts import EditNeurons, EditRoute, rerouted, scaled, silenced, unweighted
from llmbrain.intervention.targets import Heads, neuron_mask
from llmbrain.scanning.scans import Scan


class Experts:
    """Routed experts to act on, as (layer, expert) pairs; shared experts are not counted.

    Examples
    --------
    >>> Experts([(0, 3), (1, 0)])
    Experts([(0, 3), (1, 0)])
    """

    def __init__(self, experts: Sequence[tuple[int, int]]) -> None:
        array = np.asarray(experts)
        if array.size and (array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu"):
            raise InputError(f"Experts({str(experts)[:80]}) must hold pairs of whole numbers")
        self.experts = [(int(layer), int(expert)) for layer, expert in array.reshape(-1, 2).tolist()]

    def __repr__(self) -> str:
        return f"Experts({self.experts})"

    def by_layer(self, body: ExpertAnatomy) -> dict[int, list[int]]:
        """Experts of each layer.

        Raises
        ------
        InputError
            If a layer has no routed experts, or not this one.
        """
        routed, found = dict(body.routed), dict[int, list[int]]()
        for layer, expert in self.experts:
            if layer not in routed:
                raise InputError(f"what={self}: layer={layer} has no routed experts: those that do are {list(routed)}")
            if not 0 <= expert < routed[layer].count:
                raise InputError(
                    f"what={self}: expert={expert} does not exist in layer {layer}: it has {routed[layer].count}"
                )
            found.setdefault(layer, []).append(expert)
        return {layer: sorted(set(experts)) for layer, experts in found.items()}


def change_mixture(
    model: nn.Module, what: Any, *, gain: float = 0.0, complement: bool = False, verify: bool = True
) -> Intervention:
    """Multiply neurons or whole experts of a mixture of experts by `gain`; 0 is a lesion.

    `what` is `Experts`, or neurons as `neuron_mask` takes them, in the space of the model's scans. A lesioned expert
    gives nothing where it is called, its bias included; the gates of the others stay as they are. With `complement` all
    other routed experts, or all other neurons, are changed.
    """
    body = expert_anatomy(model)
    if isinstance(what, Heads):
        raise InputError("heads of a mixture of experts are not lesioned yet: pass neurons or Experts")
    if isinstance(what, Experts):
        return _whole(model, body, what, gain, complement, verify)
    mask = neuron_mask(what, body.space)
    mask = ~mask if complement else mask
    edits: list[tuple[nn.Module, Edit]] = []
    neurons: dict[nn.Module, EditNeurons] = {}
    for layer in body.layers:
        part = torch.from_numpy(mask[body.space.layer_slice(layer.index)])
        for mlp in layer.shared:
            chosen, part = part[: mlp.width], part[mlp.width :]
            if chosen.any():
                edits.append((mlp.down.module, zero(chosen) if gain == 0 else scale(chosen, gain)))
        if layer.routed is not None and part.any():
            chosen = part.reshape(layer.routed.count, layer.routed.width)
            neurons[layer.routed.module] = silenced(chosen) if gain == 0 else scaled(chosen, gain)
    _say_empty(what, not mask.any())
    return Intervention(model, edits, int(mask.sum()), verify, neurons)


def _whole(
    model: nn.Module, body: ExpertAnatomy, what: Experts, gain: float, complement: bool, verify: bool
) -> Intervention:
    if gain != 0:
        raise InputError(f"gain={gain}: whole experts are lesioned (gain=0); to amplify one, pass its neurons")
    routed, experts = dict(body.routed), what.by_layer(body)
    if complement:
        experts = {i: sorted(set(range(r.count)) - set(experts.get(i, []))) for i, r in routed.items()}
    experts = {layer: of for layer, of in experts.items() if of}
    routes: dict[nn.Module, EditRoute] = {
        routed[layer].module: unweighted(torch.tensor(of)) for layer, of in experts.items()
    }
    _say_empty(what, not experts)
    n = sum(len(of) * routed[layer].width for layer, of in experts.items())
    return Intervention(model, [], n, verify, {}, routes)


def reroute(model: nn.Module, what: Any, *, complement: bool = False, verify: bool = True) -> Intervention:
    """A lesion of routing: routers may not choose these experts, so that their tokens go to others.

    That is what the model does once they are cut out (`llmbrain.prune` of an `ExpertPlan`).

    Raises
    ------
    InputError
        If `what` is no `Experts`, or a router could not choose among what is left.
    """
    body = expert_anatomy(model)
    if not isinstance(what, Experts):
        raise InputError("value='reroute' is for Experts: neurons have no router")
    routed, gone = dict(body.routed), what.by_layer(body)
    inside = {layer: set(gone.get(layer, ())) for layer in routed}
    kept = {layer: [e for e in range(r.count) if (e in inside[layer]) == complement] for layer, r in routed.items()}
    check_kept(body, kept)
    n = sum((r.count - len(kept[layer])) * r.width for layer, r in routed.items())
    _say_empty(what, n == 0)
    return Intervention(model, [], n, verify, around=partial(rerouted, routed, kept))


def _say_empty(what: object, empty: bool) -> None:
    if empty:
        warnings.warn(f"{str(what)[:80]} changes nothing: the model is unchanged", UserWarning, stacklevel=4)


# -- controls ----------------------------------------------------------------------------------------------------------


def random_experts(what: Experts, model: nn.Module, n: int = 20, *, random_state: int | None = 0) -> list[Experts]:
    """Random sets with as many experts of every layer as `what`, drawn from all of the layer, those of `what` included.

    Parameters
    ----------
    what : Experts
    model : module
    n : int
        How many sets.
    random_state : int, optional
    """
    body = expert_anatomy(model)
    routed, rng = dict(body.routed), np.random.default_rng(seed_of(random_state))
    wanted = what.by_layer(body)
    return [
        Experts([
            (layer, int(e)) for layer, of in wanted.items()
            for e in np.sort(rng.choice(routed[layer].count, len(of), replace=False))
        ])
        for _ in range(n)
    ]  # fmt: skip


def experts_called_alike(what: Experts, model: nn.Module, scans: Sequence[Scan]) -> Experts:
    """As many other experts of the same layers, each called as nearly as often as one of `what`.

    Parameters
    ----------
    what : Experts
    model : module
    scans : sequence of Scan
        Of this model; where `Scan.visits` tells what was called.

    Raises
    ------
    InputError
        If a layer has fewer experts outside `what` than inside.
    """
    body, chosen = expert_anatomy(model), list[tuple[int, int]]()
    for layer, of in what.by_layer(body).items():
        calls: NDArray[np.int64] = np.sum([scan.visits(layer).sum(axis=0) for scan in scans], axis=0)
        free = [e for e in range(len(calls)) if e not in of]
        if len(free) < len(of):
            raise InputError(f"what={what}: layer {layer} has {len(free)} other experts, {len(of)} are needed")
        for expert in sorted(of, key=lambda e: -calls[e]):
            nearest = min(free, key=lambda e: (abs(int(calls[e]) - int(calls[expert])), e))
            free.remove(nearest)
            chosen.append((layer, nearest))
    return Experts(sorted(chosen))
