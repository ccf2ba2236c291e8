"""Texts as windows of equal length: how models are calibrated and measured here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError
from llmbrain.anatomy.families import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_WINDOW = 2048
BATCH_TOKENS = 2048  # tokens in one forward pass: enough to be fast, few enough for logits over a large vocabulary


def packed_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], window: int, max_windows: int | None = None
) -> Tensor:
    """Tokenise texts and cut them into windows.

    Each text is tokenised whole and without special tokens, preceded by BOS where the tokenizer has one; all are joined
    and cut, and what is left over at the end is dropped.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    texts : sequence of str
        A single string counts as one text.
    window : int
        Tokens in a window, at least 2.
    max_windows : int, optional
        Keep the first so many.

    Returns
    -------
    Tensor of int64, shape ``(n_windows, window)``

    Raises
    ------
    InputError
        If the texts do not fill one window; the message says how many tokens there are.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts or not all(isinstance(t, str) for t in texts):
        raise InputError(f"texts must be a list of strings with at least one text, got {_brief(texts)}")
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise InputError(f"window={window!r} must be a whole number of tokens, at least 2")
    if max_windows is not None and max_windows < 1:
        raise InputError(f"max_windows={max_windows!r} must be at least 1")
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    needed = None if max_windows is None else window * max_windows
    ids: list[int] = []
    for text in texts:
        ids += start + tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if needed is not None and len(ids) >= needed:
            break
    n = len(ids) // window
    if n == 0:
        raise InputError(f"texts hold {len(ids)} tokens, fewer than one window={window}: give more text or less window")
    return torch.tensor(ids[: n * window], dtype=torch.long).reshape(n, window)[:max_windows]


def window_length(model: nn.Module, window: int | None = None) -> int:
    """The window asked for, or the model's context length (at most 2048); more than the context is an `InputError`."""
    limit = context_length(model)
    if window is None:
        return min(limit or MAX_WINDOW, MAX_WINDOW)
    if limit is not None and window > limit:
        raise InputError(f"window={window} is longer than the model's context of {limit} tokens")
    return window


def as_windows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str] | Tensor,
    window: int | None = None,
    max_windows: int | None = None,
) -> Tensor:
    """Windows ``(n, window)`` from texts, or those that were packed already."""
    if isinstance(texts, Tensor):
        if texts.ndim != 2 or texts.shape[1] < 2 or not len(texts) or texts.is_floating_point():
            raise InputError(f"windows of shape {tuple(texts.shape)} must be token ids of shape (n >= 1, window >= 2)")
        window_length(model, texts.shape[1])
        return texts[:max_windows]
    if tokenizer is None:
        raise InputError("tokenizer=None: texts need a tokenizer (or pass windows of token ids)")
    return packed_windows(tokenizer, texts, window_length(model, window), max_windows)


def batches(windows: Tensor, tokens: int = BATCH_TOKENS) -> tuple[Tensor, ...]:
    """Windows in batches of about so many tokens."""
    return windows.split(max(1, tokens // windows.shape[1]))


def input_device(model: nn.Module) -> torch.device:
    """Device that token ids go to (the embedding's, also where accelerate spread the model)."""
    get = getattr(model, "get_input_embeddings", None)
    module = get() if get is not None else model
    return next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Evaluation mode (no dropout) within the block, without gradients unless asked for; the mode comes back."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def fingerprint(windows: Tensor) -> str:
    """Hash of token ids, for provenance: 16 hexadecimal digits."""
    return sha256(json.dumps(windows.tolist()).encode()).hexdigest()[:16]


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
