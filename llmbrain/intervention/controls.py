"""Control sets for a network: random neurons, and neurons that are as loud, both of the same number in every layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmbrain.anatomy.space import NeuronSpace

NEAREST = 5  # a matched neuron is drawn among so many nearest ones, so that matched controls differ between draws


def random_masks(mask: NDArray[np.bool_], space: NeuronSpace, n: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Random sets with as many neurons in every layer as `mask`; bool ``(n, n_neurons)``.

    Drawn from all neurons of the layer, those of `mask` included: under the null hypothesis that the network is any
    such set, its rank among them is exact.
    """
    masks = np.zeros((n, space.n_neurons), dtype=bool)
    for layer in range(space.n_layers):
        part = space.layer_slice(layer)
        count = int(mask[part].sum())
        for row in masks:
            row[part.start + rng.choice(part.stop - part.start, count, replace=False)] = True
    return masks


def matched_masks(
    mask: NDArray[np.bool_],
    space: NeuronSpace,
    levels: NDArray[np.float64],
    n: int,
    rng: np.random.Generator,
) -> NDArray[np.bool_] | None:
    """Sets outside `mask` of the same layers whose activation is most alike; bool ``(n, n_neurons)``.

    Each neuron of the network is replaced by one of the 5 nearest free neurons of its layer in (log mean ``|a|``, log
    SD). If removing loud neurons is what hurts, whatever they do, these hurt as much: the outlier-channel control.

    Parameters
    ----------
    levels : array ``(2, n_neurons)``
        Mean ``|a|`` and SD of every neuron.

    Returns
    -------
    bool array, or None where a layer has fewer neurons outside the network than inside.
    """
    tiny = max(float(levels.max()), 1.0) * 1e-12
    traits = np.log(np.maximum(levels, tiny))
    masks = np.zeros((n, space.n_neurons), dtype=bool)
    for layer in range(space.n_layers):
        part = space.layer_slice(layer)
        inside = part.start + np.flatnonzero(mask[part])
        outside = part.start + np.flatnonzero(~mask[part])
        if len(outside) < len(inside):
            return None
        if not len(inside):
            continue
        distance = ((traits[:, inside, None] - traits[:, None, outside]) ** 2).sum(axis=0)
        nearest = np.argsort(distance, axis=1, kind="stable")
        for row in masks:
            free = np.ones(len(outside), dtype=bool)
            for i in rng.permutation(len(inside)):
                candidates = nearest[i][free[nearest[i]]][:NEAREST]
                pick = rng.choice(candidates)
                free[pick] = False
                row[outside[pick]] = True
    return masks
