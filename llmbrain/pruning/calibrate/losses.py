"""What a cut should leave as it is, measured: losses of single tokens, to weigh or to sort by condition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.distributed import Parcel, ranks
from llmbrain.evaluation.perplexity import next_token_losses, predicts_next_token
from llmbrain.hooks.text import batches, evaluating, input_device


def token_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it in its window; float32 ``(n, window)``, 0 at the first.

    The ranks of a group share the windows.
    """
    parts, team = batches(windows), ranks()

    def of_batch(i: int) -> Parcel:
        return Parcel({"losses": F.pad(next_token_losses(model, parts[i]), (1, 0)).cpu()})

    with team.job("losses"), evaluating(model):
        return torch.cat([parcel.tensors["losses"] for parcel in team.each(len(parts), "losses", of_batch)])


class Objective:
    """The loss that a cut adds to on some windows.

    Of a causal language model the cross-entropy of the next token. Of any other (an encoder, a stack without a head)
    the squared distance of its last hidden states from those it had when this object was made, relative to their
    variance over tokens.

    Parameters
    ----------
    model : transformers model
        Dense, now.
    windows : (n, window) int64
    weights : (n, window) float, optional
        How much each token counts.
    """

    def __init__(self, model: nn.Module, windows: Tensor, weights: Tensor | None = None) -> None:
        self.model, self.windows = model, windows
        self.weights = torch.ones(windows.shape) if weights is None else weights
        self._states: Tensor | None = None
        if predicts_next_token(model):
            self.weights = F.pad(self.weights[:, 1:], (1, 0))  # nothing predicts the first token
        else:
            self._states = torch.cat([s.cpu() for s in self._each_state()])
            self._scale = self._states.flatten(0, 1).var(0, correction=0).sum().clamp_min(1e-12)

    def by_window(self) -> NDArray[np.float64]:
        """Loss of each window of the model as it is now, such that their mean is the mean over (weighted) tokens."""
        if self._states is None:
            losses = token_losses(self.model, self.windows)
        else:
            losses = self._changes(self._states) / self._scale
        counts = self.weights.double()
        return ((losses.double() * counts).sum(1) / counts.sum() * len(losses)).numpy()

    def mean(self) -> float:
        """Mean loss a token."""
        return float(self.by_window().mean())

    def _changes(self, before: Tensor) -> Tensor:
        """Squared distance of each token's states from those before; ``(n, window)``. Ranks share the windows."""
        parts, team = batches(self.windows), ranks()
        then = before.split(len(parts[0]))

        def of_batch(i: int) -> Parcel:
            return Parcel({"losses": (last_states(self.model, parts[i]).cpu() - then[i]).square().sum(-1)})

        with team.job("losses"), evaluating(self.model):
            return torch.cat([parcel.tensors["losses"] for parcel in team.each(len(parts), "losses", of_batch)])

    def _each_state(self) -> Iterator[Tensor]:
        with evaluating(self.model):
            for ids in batches(self.windows):
                yield last_states(self.model, ids)


def last_states(model: nn.Module, ids: Tensor) -> Tensor:
    """Hidden states after the last block and its norm; float32 ``(n, window, hidden)``."""
    stack: nn.Module = getattr(model, "base_model", model)
    states = getattr(stack(input_ids=ids.to(input_device(model))), "last_hidden_state", None)
    if states is None:
        raise InputError(
            f"model {type(model).__name__} gives neither logits of the next token nor last_hidden_state, which this "
            "way of pruning is measured by: use method='obs' or 'flap' with allocation='uniform' or 'global'"
        )
    return states.float()


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
