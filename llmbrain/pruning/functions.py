"""Function-targeted pruning: keep what a model does under some conditions, or forget it.

Scans bring the conditions (events). To keep functions, their tokens count and all others hardly do, so that what only
the others need is cheap. To forget one, its tokens count nothing, and the key neurons of the networks that prefer it go
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmbrain._validation import InputError, check_option

OTHERS = 0.02  # weight of a token whose condition is not to be kept
PREFERENCE = 2.0  # a network prefers the condition in which it has so many times the energy of the next


def token_conditions(scans: Sequence[Any], shape: tuple[int, int]) -> tuple[NDArray[np.int64], list[str]]:
    """Condition of each calibration token, as `calibration_windows` cuts scans: numbers ``(n, window)`` and names.

    -1 where a token belongs to no condition.
    """
    names = sorted({str(name) for scan in scans for name in scan.events["trial_type"]})
    if not names:
        raise InputError("keep and forget need scans with events: their texts have no conditions")
    parts = []
    for scan in scans:
        own = np.full(scan.n_tokens, -1)
        for event in scan.events.itertuples():
            start = int(event.onset)
            own[start : start + int(event.duration)] = names.index(str(event.trial_type))
        parts.append(own)
    joined = np.concatenate(parts)[: shape[0] * shape[1]]
    return joined.reshape(shape), names


def condition_weights(
    scans: Sequence[Any], shape: tuple[int, int], keep: Sequence[str] | None, forget: Sequence[str] | None
) -> Tensor:
    """How much each calibration token counts; float ``(n, window)``, mean 1."""
    labels, names = token_conditions(scans, shape)
    weights = np.ones(shape)
    if keep:
        weights = np.where(np.isin(labels, _numbers("keep", keep, names)), 1.0, OTHERS)
    if forget:
        weights = np.where(np.isin(labels, _numbers("forget", forget, names)), 0.0, weights)
    if weights.sum() == 0:
        raise InputError(f"keep={keep!r}, forget={forget!r} leave no calibration token")
    return torch.from_numpy(weights / weights.mean()).float()


def preferred_conditions(courses: Tensor, labels: NDArray[np.int64], n_conditions: int) -> NDArray[np.int64]:
    """The condition that each network prefers, or -1: the localizer of networks.

    A network's energy in a condition is the mean square of its time course over the condition's tokens.

    Returns
    -------
    int64 array ``(K,)``
    """
    square = courses.numpy().astype(float) ** 2
    energy = np.stack([square[labels == c].mean(0) for c in range(n_conditions)])
    order = np.argsort(energy, axis=0)
    best = order[-1]
    k = np.arange(energy.shape[1])
    second = energy[order[-2], k] if n_conditions > 1 else np.zeros(len(k))
    return np.where(energy[best, k] >= PREFERENCE * second, best, -1)


def neurons_to_forget(
    forget: Sequence[str], names: Sequence[str], preferred: NDArray[np.int64], masks: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Key neurons of the networks that prefer a condition to forget, and of no network that prefers another.

    Parameters
    ----------
    masks : (K, n_neurons) bool

    Returns
    -------
    bool array ``(n_neurons,)``
    """
    wanted = np.isin(preferred, _numbers("forget", forget, names))
    if not wanted.any():
        raise InputError(
            f"forget={list(forget)}: no network prefers these conditions: fit networks on more of their text"
        )
    others = masks[~wanted & (preferred >= 0)]
    return np.logical_and(masks[wanted].any(0), ~others.any(0))


def _numbers(name: str, conditions: Sequence[str], names: Sequence[str]) -> list[int]:
    conditions = [conditions] if isinstance(conditions, str) else list(conditions)
    return [list(names).index(check_option(name, c, names)) for c in conditions]
