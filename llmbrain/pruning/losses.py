"""Losses of single tokens, to weigh or to sort by condition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain.evaluation.perplexity import next_token_losses
from llmbrain.evaluation.windows import batches, evaluating


def token_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it in its window; float32 ``(n, window)``, 0 at the first."""
    with evaluating(model):
        return torch.cat([F.pad(next_token_losses(model, ids), (1, 0)).cpu() for ids in batches(windows)])


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


def log_odds(logits: Tensor, ids: Tensor) -> Tensor:
    """Log odds of each token but the first against all others: logits ``(n, window, ...)`` to ``(n, window - 1)``."""
    logits = logits[:, :-1].float()
    target = ids[:, 1:, None].to(logits.device)
    right = logits.gather(-1, target).squeeze(-1)
    return right - logits.scatter(-1, target, -torch.inf).logsumexp(-1)


@contextmanager
def gradients_of(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block these parameters alone ask for gradients, and the model is in evaluation mode."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        with evaluating(model, gradients=True):
            yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)
