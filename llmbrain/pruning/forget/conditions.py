"""Function-targeted pruning: keep what a model does under some conditions, or forget it.

Scans bring the conditions (events). To keep functions, their tokens count and all others hardly do, so that what only
the others need is cheap. To forget one: see `llmbrain.pruning.forget.neurons`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmbrain._validation import InputError, check_option
from llmbrain.pruning.calibrate.windows import scans_with_tokens
from llmbrain.scanning.scans import Scan

OTHERS = 0.02  # weight of a token whose condition is not to be kept


def token_conditions(scans: Sequence[Scan], shape: tuple[int, int]) -> tuple[NDArray[np.int64], list[str]]:
    """Condition of each calibration token, as `calibration_windows` cuts scans: numbers ``(n, window)`` and names.

    -1 where a token belongs to no condition.
    """
    scans = scans_with_tokens(scans)
    names = sorted({str(name) for scan in scans for name in scan.events["trial_type"]})
    if not names:
        raise InputError("keep and forget need scans with events: their texts have no conditions")
    parts = []
    for scan in scans:
        own = np.full(scan.n_tokens, -1)
        onsets, durations = (scan.events[c].to_numpy().astype(np.int64) for c in ("onset", "duration"))
        for start, length, name in zip(onsets, durations, scan.events["trial_type"]):
            own[start : start + length] = names.index(str(name))
        parts.append(own)
    joined = np.concatenate(parts)[: shape[0] * shape[1]]
    return joined.reshape(shape), names


def condition_weights(
    scans: Sequence[Scan], shape: tuple[int, int], keep: Sequence[str] | None, forget: Sequence[str] | None
) -> Tensor:
    """How much each calibration token counts; float ``(n, window)``, mean 1."""
    labels, names = token_conditions(scans, shape)
    weights = np.ones(shape)
    if keep:
        weights = np.where(np.isin(labels, condition_numbers("keep", keep, names)), 1.0, OTHERS)
    if forget:
        weights = np.where(np.isin(labels, condition_numbers("forget", forget, names)), 0.0, weights)
    if weights.sum() == 0:
        raise InputError(f"keep={keep!r}, forget={forget!r} leave no calibration token")
    return torch.from_numpy(weights / weights.mean()).float()


def condition_numbers(name: str, conditions: Sequence[str], names: Sequence[str]) -> list[int]:
    """Numbers of conditions; an unknown one is an `InputError`."""
    conditions = [conditions] if isinstance(conditions, str) else list(conditions)
    return [list(names).index(check_option(name, c, names)) for c in conditions]
