"""What functional networks add to pruning: weights of calibration tokens, and coverage.

Tokens: text shows frequent functions often and rare ones seldom, and a criterion that averages over tokens follows
suit. A network's time course says at which tokens its function runs; giving each network the same total weight gives
rare functions a voice. Coverage: no network may lose nearly all of its key neurons in a layer, whatever their scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.architectures import Anatomy
from llmbrain.evaluation.windows import batches, evaluating, input_device
from llmbrain.intervention.targets import unit_space

COVER = 0.5  # of the share of its key neurons that a network would keep if neurons were cut at random
LIMIT = 20.0  # largest weight of a token, in mean weights


def time_courses(model: nn.Module, body: Anatomy, windows: Tensor, networks: Any) -> Tensor:
    """Time courses of networks over windows, by least squares of each token's activations on the maps.

    Stage 1 of dual regression: ``x_t M^+`` with M the maps (K, neurons). Signals are projected as they pass, not kept.
    Networks that span heads are followed by their neurons.

    Returns
    -------
    float32 tensor ``(n, window, K)``, each network centred over all tokens
    """
    check_space(networks, body)
    maps = np.asarray(networks.maps)[:, : sum(body.widths)]
    projector = torch.linalg.pinv(torch.as_tensor(maps, dtype=torch.float64)).float()
    slices = [networks.space.layer_slice(i) for i in range(len(body.layers))]
    found: list[Tensor] = []

    def listen(part: Tensor) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().float()
            x = x if x.ndim == 3 else x.unflatten(0, found[-1].shape[:2])
            found[-1] += (x @ part.to(x.device)).to(found[-1].device)

        return hook

    handles = [
        layer.down.module.register_forward_pre_hook(listen(projector[part])) for layer, part in zip(body.layers, slices)
    ]
    try:
        with evaluating(model):
            for batch in batches(windows):
                found.append(torch.zeros(*batch.shape, projector.shape[1]))
                model(input_ids=batch.to(input_device(model)))
    finally:
        for handle in handles:
            handle.remove()
    courses = torch.cat(found)
    return courses - courses.mean((0, 1))


def balanced_weights(courses: Tensor, strength: float) -> Tensor:
    """Weights of tokens that bring networks nearer to the same total.

    ``w_t = mean_k a_tk`` with ``a_tk`` the share of network k's energy at token t, times the number of tokens; mixed
    with equal weights: ``(1 - strength) + strength * w``. Mean 1.

    Parameters
    ----------
    courses : (n, window, K)
    strength : float
        0 leaves all tokens alike.

    Returns
    -------
    float tensor ``(n, window)``
    """
    energy = courses.square()
    share = energy / energy.sum((0, 1)).clamp_min(torch.finfo(torch.float32).tiny)
    weights = share.mean(-1) * courses.shape[0] * courses.shape[1]
    weights = (1 - strength) + strength * weights.clamp_max(LIMIT)
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


def layer_masks(networks: Any, body: Anatomy, *, heads: bool = False) -> list[NDArray[np.bool_]] | None:
    """Key units of each network, layer by layer: ``(K, width)``; of heads the key/value groups that hold a key head.

    None for the heads of networks that hold none.
    """
    check_space(networks, body)
    masks, n = np.asarray(networks.masks), len(body.layers)
    if not heads:
        return [masks[:, networks.space.layer_slice(i)] for i in range(n)]
    if networks.space.n_layers == n:
        return None
    found = []
    for layer in body.layers:
        of_layer: NDArray[np.bool_] = masks[:, networks.space.layer_slice(n + layer.index)]
        groups = layer.out.units if layer.out is not None else 0
        found.append(np.any(of_layer.reshape(len(masks), groups, -1), axis=2) if groups else of_layer)
    return found


def check_space(networks: Any, body: Anatomy) -> None:
    """Networks must lie in the neurons of this model, or in its neurons and heads (`Scan.joined`)."""
    widths: Sequence[int] = tuple(networks.space.widths)
    if widths != body.widths and networks.space != unit_space(body):
        raise InputError(f"networks lie in layers of {list(widths)} neurons, the model has {list(body.widths)}")
