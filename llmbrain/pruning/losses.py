"""Losses of single tokens, to weigh or to sort by condition."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.evaluation.windows import batches, evaluating, input_device


def token_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it in its window; float32 ``(n, window)``, 0 at the first."""
    found = []
    with evaluating(model):
        for batch in batches(windows):
            ids = batch.to(input_device(model))
            logits = getattr(model(input_ids=ids), "logits", None)
            if logits is None or logits.shape[:2] != ids.shape:
                raise InputError(f"model {type(model).__name__} gives no next-token logits: allocate by scores instead")
            target = ids[:, 1:].flatten().to(logits.device)
            losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target, reduction="none")
            found.append(F.pad(losses.unflatten(0, (len(ids), -1)), (1, 0)).cpu())
    return torch.cat(found)


def weighted_loss(model: nn.Module, windows: Tensor, weights: Tensor | None = None) -> float:
    """Mean loss a token, each counted by its weight ``(n, window)``; nan where no token counts."""
    losses = token_losses(model, windows)[:, 1:].double()
    if weights is None:
        return float(losses.mean())
    counts = weights[:, 1:].double()
    return float((losses * counts).sum() / counts.sum())


def window_losses(model: nn.Module, windows: Tensor, weights: Tensor | None = None) -> NDArray[np.float64]:
    """Loss of each window, such that their mean is `weighted_loss`."""
    losses = token_losses(model, windows)[:, 1:].double()
    counts = torch.ones_like(losses) if weights is None else weights[:, 1:].double()
    return ((losses * counts).sum(1) / counts.sum() * len(windows)).numpy()
