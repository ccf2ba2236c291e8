"""Function-targeted pruning: keep what a model does under some conditions, or forget it.

Scans bring the conditions (events). To keep functions, their tokens count and all others hardly do, so that what only
the others need is cheap. To forget one, the neurons that are active under it and under no other go, and its tokens
count nothing when the rest is refitted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError, check_option
from llmbrain.architectures import Anatomy
from llmbrain.evaluation.windows import batches, evaluating, input_device

OTHERS = 0.02  # weight of a token whose condition is not to be kept
SELECTIVE = 2.0  # a neuron so many times as active under a condition as under any other belongs to it


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


def condition_selectivity(
    model: nn.Module,
    body: Anatomy,
    windows: Tensor,
    labels: NDArray[np.int64],
    names: Sequence[str],
    forget: Sequence[str],
) -> NDArray[np.float64]:
    """How much more each neuron is active under the conditions to forget than under any other.

    ``mean |x|`` over the tokens of a condition; the largest of the conditions to forget, divided by the largest of the
    others. On the demo brain this beat the first-order effect on the loss, and the networks that prefer the condition.

    Returns
    -------
    float64 array ``(n_neurons,)``
    """
    chosen = _numbers("forget", forget, names)
    onehot = torch.from_numpy(labels[..., None] == np.arange(len(names))).float()
    if len(chosen) == len(names):
        raise InputError(f"forget={list(forget)} names every condition: nothing would be left")
    sums = [torch.zeros(len(names), w) for w in body.widths]
    parts: list[Tensor] = []

    def listen(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().abs().float().flatten(0, -2).cpu()
            sums[i] += parts[-1].T @ x

        return hook

    handles = [layer.down.module.register_forward_pre_hook(listen(i)) for i, layer in enumerate(body.layers)]
    try:
        with evaluating(model):
            for batch, part in zip(batches(windows), batches_like(onehot, windows)):
                parts.append(part.flatten(0, 1))
                model(input_ids=batch.to(input_device(model)))
    finally:
        for handle in handles:
            handle.remove()
    level = (torch.cat(sums, 1) / onehot.sum((0, 1))[:, None].clamp_min(1)).double().numpy()
    others = np.delete(level, chosen, axis=0).max(0)
    return level[chosen].max(0) / (others + 0.05 * np.median(level[chosen]) + 1e-12)


def batches_like(values: Tensor, windows: Tensor) -> tuple[Tensor, ...]:
    """Values of windows, split as `batches` splits the windows."""
    return values.split([len(b) for b in batches(windows)])


def neurons_to_forget(selectivity: NDArray[np.float64], least: float, most: int | None = None) -> NDArray[np.bool_]:
    """Neurons whose selectivity is at least `least`; the `most` selective of them where a number is given."""
    chosen = selectivity >= least
    if most is not None:
        chosen[np.argsort(-selectivity, kind="stable")[most:]] = False
    return chosen


def _numbers(name: str, conditions: Sequence[str], names: Sequence[str]) -> list[int]:
    conditions = [conditions] if isinstance(conditions, str) else list(conditions)
    return [list(names).index(check_option(name, c, names)) for c in conditions]
