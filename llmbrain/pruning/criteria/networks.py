"""What functional networks add to pruning: weights of calibration tokens, and coverage.

Tokens: text shows frequent functions often and rare ones seldom, and a criterion that averages over tokens follows
suit. Networks found in that text are those of its frequent functions; so what they leave unexplained marks the tokens
at which rare ones run, and gives these a voice. Coverage: no network may lose nearly all of its key neurons in a layer,
whatever their scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.families import Anatomy
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.anatomy.units import NEURONS, Units
from llmbrain.distributed import Parcel, ranks
from llmbrain.hooks.listen import hear_inputs
from llmbrain.hooks.text import batches, evaluating, input_device
from llmbrain.intervention.targets import unit_space
from llmbrain.networks import FunctionalNetworks
from llmbrain.pruning.criteria.base import Criterion, Evidence, Material, best_units, ends, register
from llmbrain.pruning.criteria.obs_gradient import obs_gradient

COVER = 0.5  # of the share of its key neurons that a network would keep if neurons were cut at random
BALANCE = 0.5  # strength of token weights in shallow models, where nothing is said
DEAD = 1e-6  # of its layer's largest spread: a neuron that never changes
DEEP = 20  # layers of a model whose first three and last two are not cut
LIMIT = 20.0  # largest energy of a token, in mean energies


@register("networks", "activations", "gradients", "networks", standardize=False, sequential=True, allocation="search")
class Networks(Criterion):
    """Ours: `obs_gradient`, with every network covered, and tokens that networks leave unexplained weighted more.

    Coverage enters the choice; weights the moments, the metric, the measured losses and the repair. Without networks it
    is `obs_gradient` with the allocation that measured best.
    """

    def __init__(self) -> None:
        self._masks: dict[Units, list[NDArray[np.bool_]] | None] = {}

    def weigh(self, material: Material) -> Tensor | None:
        """By the energy that networks leave unexplained, as far as `token_balance` says."""
        strength, networks = balance_of(material.token_balance, len(material.body.layers)), material.networks
        if networks is None:
            material.notes.append("no networks given: tokens count alike, nothing is covered")
            return None
        layer_masks(networks, material.body)  # fails before any work
        weights = None
        if strength and material.weights is None and material.windows is not None:
            energy = unexplained_energy(material.model, material.body, material.windows, networks)
            weights = balanced_weights(energy, strength)
        applied = strength if weights is not None else 0.0
        material.details["networks"] = {"n": len(networks.maps), "token_balance": applied, "cover": COVER}
        return weights

    def prepare(self, material: Material, units: Units) -> None:
        """Key units by layer."""
        networks = material.networks
        self._masks[units] = None if networks is None else layer_masks(networks, material.body, units)

    def protect(self, n_layers: int, notes: list[str]) -> tuple[int, ...]:
        """The first 3 and last 2 layers of deep models (`DEEP`).

        Of SmolLM2 (30 layers) they were the difference between right and wrong on text that was not calibrated on; see
        ``benchmarks/real.py``.
        """
        if n_layers < DEEP:
            return ()
        notes.append("the first 3 and last 2 layers of a deep model are not cut; protect=[] cuts them too")
        return ends(n_layers)

    def spread(self, n_layers: int) -> str:
        """A search of the widths, and with deep models (`DEEP`) uniform ones.

        A search takes passes by the dozen there, and nobody has measured that it gains anything; uniform widths are
        what ``benchmarks/real.py`` measures as the default.
        """
        return self.allocation if n_layers < DEEP else "uniform"

    def score(self, evidence: Evidence) -> Tensor:
        """As `obs_gradient`."""
        return obs_gradient(evidence)

    def choose(self, scores: NDArray[np.float64], count: int, layer: int, units: Units) -> NDArray[np.int64]:
        """The best, such that each network keeps some of its key units."""
        masks = self._masks[units]
        return best_units(scores, count) if masks is None else covered(scores, count, masks[layer])


def balance_of(asked: float | None, n_layers: int) -> float:
    """Strength of token weights where the user does not say: `BALANCE`, and none in deep models.

    These are calibrated on text of their own beside, in which rare functions are not rare: on SmolLM2 weights made
    things worse (``benchmarks/real.py``).
    """
    if asked is not None:
        return asked
    return BALANCE if n_layers < DEEP else 0.0


def unexplained_energy(model: nn.Module, body: Anatomy, windows: Tensor, networks: FunctionalNetworks) -> Tensor:
    """What networks leave over of the activity at each token, relative to its mean.

    With z the z-scored neuron signals of a token and Q an orthonormal basis of the networks' maps: ``|z|^2 - |Q z|^2``.
    Signals are projected as they pass, not kept: one pass for means and variances, one for the energies. Of networks
    that span heads the neurons count. The ranks of a group share the windows.

    Parameters
    ----------
    windows : (n, window) int64
    networks : FunctionalNetworks

    Returns
    -------
    float32 tensor ``(n, window)``, mean 1
    """
    check_space(networks, body)
    basis = torch.linalg.qr(torch.as_tensor(np.asarray(networks.maps)[:, : sum(body.widths)].T).double())[0].float()
    parts = basis.split(list(body.widths))
    sums = [torch.zeros(2, width, dtype=torch.float64) for width in body.widths]

    def add(i: int, x: Tensor) -> None:
        sums[i] = sums[i].to(x.device)
        sums[i] += torch.stack([x.sum((0, 1), dtype=torch.float64), x.double().square().sum((0, 1))])

    team, parts_of_text = ranks(), batches(windows)
    mine = team.mine(len(parts_of_text))
    _hear(model, body, [parts_of_text[i] for i in mine], add)
    sums = team.sum(sums, "energy")
    means = [s[0] / windows.numel() for s in sums]
    spreads = [(s[1] / windows.numel() - m.square()).clamp_min(0).sqrt() for s, m in zip(sums, means)]
    energy: list[Tensor] = []  # one entry a batch
    explained: list[Tensor] = []

    def project(i: int, x: Tensor) -> None:
        if i == 0:
            energy.append(torch.zeros(x.shape[:2]))
            explained.append(torch.zeros(*x.shape[:2], basis.shape[1]))
        live = spreads[i] > DEAD * spreads[i].max()
        z = torch.where(live, (x.double() - means[i]) / torch.where(live, spreads[i], 1.0), 0.0).float()
        energy[-1] += z.square().sum(-1).cpu()
        explained[-1] += (z @ parts[i].to(z.device)).cpu()

    _hear(model, body, [parts_of_text[i] for i in mine], project)
    found = [(e - x.square().sum(-1)).clamp_min(0) for e, x in zip(energy, explained)]
    every = team.each(len(parts_of_text), "energy", lambda i: Parcel({"left": found[i // team.size]}))
    left = torch.cat([parcel.tensors["left"] for parcel in every])
    return left / left.mean().clamp_min(torch.finfo(torch.float32).tiny)


def _hear(model: nn.Module, body: Anatomy, parts: Sequence[Tensor], listen: Callable[[int, Tensor], None]) -> None:
    """Run batches; `listen` gets the number and the neurons ``(n, window, width)`` of each layer of each batch."""
    shape = [0, 0]

    def hearing(i: int) -> Callable[[Tensor], None]:
        return lambda x: listen(i, x.detach().reshape(*shape, -1))

    places = [(layer.down.module, hearing(i)) for i, layer in enumerate(body.layers)]
    with evaluating(model), hear_inputs(model, places):
        for batch in parts:
            shape[:] = batch.shape
            model(input_ids=batch.to(input_device(model)))


def balanced_weights(energy: Tensor, strength: float) -> Tensor:
    """Weights of tokens: equal ones mixed with their unexplained energy, ``(1 - strength) + strength * energy``.

    Parameters
    ----------
    energy : (n, window)
        Of `unexplained_energy`; more than `LIMIT` counts as `LIMIT`.
    strength : float
        0 leaves all tokens alike.

    Returns
    -------
    float tensor ``(n, window)``, mean 1
    """
    weights = (1 - strength) + strength * energy.clamp_max(LIMIT)
    return weights / weights.mean()


def covered(
    scores: NDArray[np.float64], count: int, masks: NDArray[np.bool_], cover: float = COVER
) -> NDArray[np.int64]:
    """The best `count` units of a layer, such that every network keeps some of its key neurons.

    A network with n key neurons in the layer keeps at least ``floor(cover * n * count / width)`` of them: its best.

    Parameters
    ----------
    scores : (width,)
    masks : (K, width) bool
        Key neurons of each network.

    Returns
    -------
    ascending indices ``(count,)``
    """
    order = np.argsort(-scores, kind="stable")
    forced = np.zeros(len(scores), dtype=bool)
    for mask in masks:
        least = int(cover * mask.sum() * count / len(scores))
        forced[order[mask[order]][:least]] = True
    first = order[forced[order]][:count]  # overlapping demands never exceed what fits
    rest = order[~forced[order]][: count - len(first)]
    return np.sort(np.concatenate([first, rest])).astype(np.int64)


def layer_masks(networks: FunctionalNetworks, body: Anatomy, units: Units = NEURONS) -> list[NDArray[np.bool_]] | None:
    """Key units of each network, layer by layer: ``(K, width)``; of heads the key/value groups that hold a key head.

    None for the heads of networks that hold none.
    """
    space, n = check_space(networks, body), len(body.layers)
    masks: NDArray[np.bool_] = np.asarray(networks.masks)
    if units is NEURONS:
        return [masks[:, space.layer_slice(i)] for i in range(n)]
    if space.n_layers == n:
        return None
    found = []
    for layer in body.layers:
        of_layer: NDArray[np.bool_] = masks[:, space.layer_slice(n + layer.index)]
        groups = units.count(layer)
        found.append(np.any(of_layer.reshape(len(masks), groups, -1), axis=2) if groups else of_layer)
    return found


def check_space(networks: FunctionalNetworks, body: Anatomy) -> NeuronSpace:
    """The networks' space, which must be the neurons of this model, or its neurons and heads (`Scan.joined`)."""
    space = networks.space
    if space is None or (space.widths != body.widths and space != unit_space(body)):
        lie = "no neurons (parcels, say)" if space is None else f"layers of {list(space.widths)} neurons"
        raise InputError(f"networks lie in {lie}, the model has {list(body.widths)}")
    return space
