"""Neurons to cut so that what is left does not learn again quickly: found by relearning once, and looking."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain.anatomy.families import Anatomy, anatomy
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.pruning.forget.neurons import Forgetting, neurons_to_forget
from llmbrain.pruning.forget.relearning import Relearning, teach

ROUNDS = 3  # of relearning and looking
TEACHING = Relearning(lines=(128,), steps=40)  # what the relearning that is looked at may do


def neurons_that_relearn(
    model: nn.Module,
    body: Anatomy,
    windows: Tensor,
    labels: NDArray[np.int64],
    names: Sequence[str],
    forget: Sequence[int],
    lines: Sequence[Tensor],
    found: Forgetting,
    *,
    most: int | None = None,
    level: float = 0.0,
    attribution: str = "gradient",
) -> Forgetting:
    """More neurons, after those of `neurons_to_forget`: the ones that a relearned model does it with.

    A copy without the neurons found so far is taught the lines again; those that it then needs for the conditions are
    found as in the dense model, and go as well. `ROUNDS` times, or until it learns nothing any more.

    Parameters
    ----------
    windows, labels, names, forget, most, level, attribution
        As for `neurons_to_forget`.
    lines : sequence of int64 tensor
        Of the conditions to forget.
    found : Forgetting
        What `neurons_to_forget` gave.

    Returns
    -------
    Forgetting
        All neurons, and the shares left after every round of all searches.
    """
    gone, left = found.gone.copy(), list(found.left)
    for i in range(ROUNDS):
        if most is not None and int(gone.sum()) >= most:
            break
        taught: Any = copy.deepcopy(model)
        _silence(anatomy(taught), gone)
        for _ in teach(taught, lines[: max(TEACHING.lines)], TEACHING, random_state=i):
            pass
        _silence(anatomy(taught), gone)
        again = neurons_to_forget(
            taught, anatomy(taught), windows, labels, names, forget, most=most, level=level, attribution=attribution,
            gone=gone,
        )  # fmt: skip
        left += again.left
        if again.gone.sum() == gone.sum():
            break
        gone = again.gone
    return Forgetting(gone, left)


def _silence(body: Anatomy, gone: NDArray[np.bool_]) -> None:
    """Weights of these neurons become zero on both sides, so that gradients never bring one back."""
    space = NeuronSpace(body.widths)
    with torch.no_grad():
        for layer in body.layers:
            silent = torch.from_numpy(np.flatnonzero(gone[space.layer_slice(layer.index)]))
            for projection in layer.neuron_projections:
                weight: Any = projection.module.weight
                weight.index_fill_(projection.axis, projection.rows(silent).to(weight.device), 0)
                bias = getattr(projection.module, "bias", None)
                if bias is not None and projection.is_output:
                    bias.index_fill_(0, projection.rows(silent).to(bias.device), 0)
