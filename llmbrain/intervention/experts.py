"""Lesions of a mixture of experts: of neurons inside experts, and of whole experts; and controls for the latter."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError, seed_of
from llmbrain.anatomy.expert_surgery import check_kept
from llmbrain.anatomy.experts import ExpertAnatomy, expert_anatomy
from llmbrain.hooks.change import Edit, Intervention, Resample, constant, scale, zero
from llmbrain.hooks.experts import EditNeurons, EditRoute, Held, Redrawn, rerouted, scaled, silenced, unweighted
from llmbrain.intervention.expert_values import READS, Place, held_over, pools_of
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

    def by_layer(self, body: ExpertAnatomy, complement: bool = False) -> dict[int, list[int]]:
        """Experts of each layer; with `complement`, all other routed experts. Layers without any are left out.

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
        if complement:
            found = {layer: sorted(set(range(r.count)) - set(found.get(layer, []))) for layer, r in routed.items()}
        return {layer: sorted(set(experts)) for layer, experts in found.items() if experts}


@dataclass(frozen=True)
class Filling:
    """What lesioned neurons hold instead of zero.

    Attributes
    ----------
    means : float64 ``(n_neurons,)``, optional
        These; nan where nothing is known.
    pools : dict of (layer, expert) -> tensor ``(calls, n_chosen)``, optional
        Or what they held together at a random call (shared experts: token); see `pools_of`.
    seed : int
        Of what is drawn.
    """

    means: NDArray[np.float64] | None = None
    pools: Mapping[Place, Tensor] | None = None
    seed: int = 0


def filling_of(model: nn.Module, what: Any, value: str, reference: Any, seed: int, complement: bool) -> Filling:
    """What a lesion to "mean" or "resample" puts in place of what neurons say.

    Raises
    ------
    InputError
        If the reference is missing, or does not tell which experts were called.
    """
    if reference is None:
        raise InputError(f"value={value!r} needs reference=: {READS}")
    body = expert_anatomy(model)
    if value == "mean":
        return Filling(means=held_over(model, body, reference).means)
    return Filling(pools=pools_of(model, body, mask_of(what, body, complement), reference), seed=seed)


def mask_of(what: Any, body: ExpertAnatomy, complement: bool = False) -> NDArray[np.bool_]:
    """The neurons that are changed, ``(n_neurons,)``: of whole routed experts, or as `neuron_mask` says."""
    if isinstance(what, Heads):
        raise InputError("heads of a mixture of experts are not lesioned yet: pass neurons or Experts")
    if not isinstance(what, Experts):
        mask = neuron_mask(what, body.space)
        return ~mask if complement else mask
    mask = np.zeros(body.space.n_neurons, dtype=bool)
    for layer, of in what.by_layer(body, complement).items():
        first = len(body.layers[layer].shared)
        for expert in of:
            mask[body.space.expert_slice(layer, first + expert)] = True
    return mask


def change_mixture(
    model: nn.Module, what: Any, *, gain: float = 0.0, complement: bool = False, verify: bool = True,
    filling: Filling | None = None,
) -> Intervention:  # fmt: skip
    """Multiply neurons or whole experts of a mixture of experts by `gain`; 0 is a lesion.

    `what` is `Experts`, or neurons as `neuron_mask` takes them, in the space of the model's scans. A lesioned expert
    gives nothing where it is called, its bias included; the gates of the others stay as they are. With `complement` all
    other routed experts, or all other neurons, are changed. With `filling` neurons hold that instead of zero (and the
    bias of an expert's output stays).
    """
    body = expert_anatomy(model)
    if isinstance(what, Experts) and gain != 0:
        raise InputError(f"gain={gain}: whole experts are lesioned (gain=0); to amplify one, pass its neurons")
    mask = mask_of(what, body, complement)
    _say_empty(what, not mask.any())
    if isinstance(what, Experts) and filling is None:
        routed = dict(body.routed)
        routes: dict[nn.Module, EditRoute] = {
            routed[layer].module: unweighted(torch.tensor(of)) for layer, of in what.by_layer(body, complement).items()
        }
        return Intervention(model, [], int(mask.sum()), verify, {}, routes)
    edits: list[tuple[nn.Module, Edit]] = []
    neurons: dict[nn.Module, EditNeurons] = {}
    for layer in body.layers:
        part = torch.from_numpy(mask[body.space.layer_slice(layer.index)])
        for mlp in layer.shared:
            chosen, part = part[: mlp.width], part[mlp.width :]
            if chosen.any():
                edits.append((mlp.down.module, _of_shared(chosen, body, layer.index, gain, filling)))
        if layer.routed is not None and part.any():
            chosen = part.reshape(layer.routed.count, layer.routed.width)
            neurons[layer.routed.module] = _of_routed(chosen, body, layer.index, gain, filling)
    return Intervention(model, edits, int(mask.sum()), verify, neurons)


def _of_shared(chosen: Tensor, body: ExpertAnatomy, layer: int, gain: float, filling: Filling | None) -> Edit:
    if filling is None:
        return zero(chosen) if gain == 0 else scale(chosen, gain)
    if filling.means is not None:
        return constant(chosen, torch.from_numpy(filling.means[body.space.expert_slice(layer, 0)])[chosen])
    assert filling.pools is not None
    return Resample(chosen.nonzero()[:, 0], filling.pools[layer, 0], filling.seed + 2 * layer)


def _of_routed(chosen: Tensor, body: ExpertAnatomy, layer: int, gain: float, filling: Filling | None) -> EditNeurons:
    if filling is None:
        return silenced(chosen) if gain == 0 else scaled(chosen, gain)
    place = body.layers[layer]
    assert place.routed is not None
    first, path = len(place.shared), place.routed.path
    if filling.means is not None:
        start = body.space.expert_slice(layer, first).start
        values = torch.from_numpy(filling.means[start : start + chosen.numel()])
        return Held(chosen, values.reshape(chosen.shape), path)
    assert filling.pools is not None
    pools = {part - first: pool for (at, part), pool in filling.pools.items() if at == layer and part >= first}
    return Redrawn(chosen, pools, filling.seed + 2 * layer + 1, path)


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
