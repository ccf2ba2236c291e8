"""Control sets for a network: random neurons, and neurons that are as loud, both of the same number in every layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmbrain._validation import check_count
from llmbrain.anatomy.space import NeuronSpace

STRATUM = 20  # neurons of a layer that count as equally active, at least


def random_masks(mask: NDArray[np.bool_], space: NeuronSpace, n: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Random sets with as many neurons in every layer as `mask`; bool ``(n, n_neurons)``.

    Drawn from all neurons of the layer, those of `mask` included: under the null hypothesis that the network is any
    such set, its rank among them is exact.
    """
    masks = np.zeros((check_count("n_random", n), space.n_neurons), dtype=bool)
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
    """Sets with as many neurons of every level of activation in every layer as `mask`; bool ``(n, n_neurons)``.

    The neurons of a layer are put in order of mean ``|a|`` times SD and cut into groups of at least 20; a draw takes as
    many of each group as the network has there, its own among them. Under the null hypothesis that the network is any
    set as active as it is, its rank among the draws is exact (drawing the nearest neurons outside the network instead
    gives p <= .05 in 8 to 15% of random networks). If removing loud neurons is what hurts, whatever they do, these hurt
    as much: the outlier-channel control.

    Parameters
    ----------
    levels : array ``(2, n_neurons)``
        Mean ``|a|`` and SD of every neuron.

    Returns
    -------
    bool array, or None where a layer has fewer neurons outside the network than inside: most of a draw would be the
    network itself.
    """
    tiny = max(float(levels.max()), 1.0) * 1e-12
    loudness = np.log(np.maximum(levels, tiny)).sum(axis=0)
    masks = np.zeros((n, space.n_neurons), dtype=bool)
    for layer in range(space.n_layers):
        part = space.layer_slice(layer)
        width, inside = part.stop - part.start, int(mask[part].sum())
        if width < 2 * inside:
            return None
        if not inside:
            continue
        ordered = part.start + np.argsort(loudness[part], kind="stable")
        for stratum in np.array_split(ordered, max(1, width // STRATUM)):
            count = int(mask[stratum].sum())
            for row in masks:
                row[rng.choice(stratum, count, replace=False)] = True
    return masks
