"""Perplexity in packed windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmbrain._progress import bar
from llmbrain._validation import InputError
from llmbrain.hooks.probe import is_causal
from llmbrain.hooks.text import as_windows, batches, evaluating, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # a target that is none
AT_ONCE = 2**25  # logits whose log probabilities are held at once


def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str] | Tensor,
    *,
    window: int | None = None,
    max_windows: int | None = None,
) -> float:
    """How surprised a causal language model is by texts.

    Texts are tokenized as a scan reads them (with the tokenizer's default special tokens), joined and cut into windows;
    each window predicts its own tokens but the first. ``exp`` of the mean cross-entropy of all of them.

    Parameters
    ----------
    model : causal language model of transformers
    tokenizer : its tokenizer; None if `texts` are windows
    texts : list of str, or int64 windows ``(n, window)``
    window : int, optional
        Tokens in a window; default the model's context length, at most 2048.
    max_windows : int, optional
        Use only the first so many.

    Returns
    -------
    float
        ``inf`` where the loss is too large for a float.

    Raises
    ------
    InputError
        If there is less text than one window, a window exceeds the context, or what the model says at a token changes
        with later tokens (it reads in both directions) or is no logits.
    """
    windows = as_windows(model, tokenizer, texts, window, max_windows)
    check_causal(model)
    return math.exp(min(mean_loss(model, windows), 709.0))


def predicts_next_token(model: nn.Module) -> bool:
    """Whether a model is a causal language model with its head: encoders and bare stacks of blocks are not.

    What its class says is tried on the model itself: changing later tokens must leave what it says before them.
    """
    can_generate = getattr(model, "can_generate", None)
    if not callable(can_generate) or not can_generate() or type(model).__name__.endswith("ForMaskedLM"):
        return False
    return is_causal(model)


def check_causal(model: nn.Module) -> None:
    """Refuse a model whose losses have seen the answer.

    Raises
    ------
    InputError
    """
    if type(model).__name__.endswith("ForMaskedLM") or not is_causal(model):
        raise InputError(
            f"model {type(model).__name__} has no next-token perplexity: what it says at a token changes with later "
            "tokens (it reads in both directions), or it gives no logits: use a causal model"
        )


def next_token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it: ``(n, length)`` ids, float32 ``(n, length - 1)`` losses."""
    ids = ids.to(input_device(model))
    logits = getattr(model(input_ids=ids), "logits", None)
    if logits is None or logits.shape[:2] != ids.shape:
        raise InputError(f"model {type(model).__name__} gives no next-token logits: use a causal model")
    target = F.pad(ids[:, 1:], (0, 1), value=IGNORED).flatten().to(logits.device)  # no copy of all logits but the last
    rows = max(1, AT_ONCE // logits.shape[-1])
    # log probabilities are as large as the logits: a part at a time, and found again for gradients, not kept
    again = torch.is_grad_enabled() and len(target) > rows
    losses = torch.cat([
        checkpoint(_cross_entropy, *part, use_reentrant=False, preserve_rng_state=False) if again
        else _cross_entropy(*part) for part in zip(logits.flatten(0, 1).split(rows), target.split(rows))
    ])  # fmt: skip
    return losses.unflatten(0, (len(ids), -1))[:, :-1]


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target, reduction="none", ignore_index=IGNORED)


def window_losses(model: nn.Module, windows: Tensor, *, progress: bool = False) -> NDArray[np.float64]:
    """Mean cross-entropy (nats a token) of each window of ``(n, window)``, positions 1 to its end; float64 ``(n,)``."""
    found = []
    with evaluating(model):
        for ids in bar(batches(windows), desc="windows", show=progress, leave=False):
            found.append(next_token_losses(model, ids).mean(dim=1, dtype=torch.float64).cpu().numpy())
    losses = np.concatenate(found)
    if np.isnan(losses).any():
        raise InputError(f"model {type(model).__name__} gives NaN logits: its weights or dtype are broken")
    return losses


def mean_loss(model: nn.Module, windows: Tensor) -> float:
    """Mean cross-entropy (nats a token) over windows ``(n, window)``, positions 1 to the end of each."""
    return float(window_losses(model, windows).mean())
