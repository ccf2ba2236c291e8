"""Recover what pruning cost by a short low-rank fine-tuning (LoRA, arXiv 2106.09685), merged at the end."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmbrain._progress import bar
from llmbrain._validation import InputError, check_count, check_range, check_whole, seed_of, soft_import
from llmbrain.anatomy.families import anatomy
from llmbrain.checkpoints.shapes import RECORD
from llmbrain.evaluation.perplexity import mean_loss
from llmbrain.hooks.change import refuse_changed
from llmbrain.hooks.text import as_windows, digest, evaluation_mode, input_device

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

HELD_OUT = 16  # one window in so many is held out to measure the effect
AT_ONCE = 1024  # tokens in a backward pass: more of a batch are read one part after the other


def recover(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str] | Tensor,
    *,
    steps: int,
    rank: int = 8,
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    window: int | None = None,
    random_state: int | None = 0,
    inplace: bool = False,
) -> tuple[Any, pd.DataFrame]:
    """Train low-rank updates of all MLP and attention projections on next-token loss, then merge them.

    Parameters
    ----------
    model : causal language model
        Pruned or not, of any widths; not changed unless `inplace`. Its shapes, dtype and format stay.
    tokenizer, texts
        What to train on; one window in 16 is held out for the table.
    steps : int
        Optimiser steps (AdamW, linear warm-up over 5%, cosine decay to zero).
    rank : int
        Of the updates; their scale is ``2 * rank / rank = 2``.
    learning_rate : float
    batch_size : int
        Windows a step; memory does not grow with them.
    window : int, optional
        Tokens in a window; default the model's context, at most 512.
    random_state : int
        Of the updates' start and of the order of windows.

    Returns
    -------
    model, table
        The model, in evaluation mode; and perplexity before and after on held-out and on training windows.

    Raises
    ------
    InputError
        If peft is not installed, or there are fewer than two windows of text.
    """
    refuse_changed(model, "recover")
    check_count("steps", steps, 1)
    widest = max((min(p.shape) for p in model.parameters() if p.ndim == 2), default=1)
    check_whole("rank", rank, 1, widest)  # an update of the widest matrix has no larger one
    check_whole("batch_size", batch_size, 1)
    check_range("learning_rate", learning_rate, 0, open_low=True)
    peft = soft_import("peft", "recovery", "recover")
    windows = as_windows(model, tokenizer, texts, window or min(512, _context(model)))
    if len(windows) < 2:
        raise InputError(f"texts fill {len(windows)} windows of {windows.shape[1]} tokens: at least 2 are needed")
    small: Any = model if inplace else copy.deepcopy(model)
    every = min(HELD_OUT, len(windows))
    is_held = torch.arange(len(windows)) % every == every - 1
    held, train = windows[is_held], windows[~is_held]
    seen = train[: len(held)]
    before = mean_loss(small, held), mean_loss(small, seen)
    with torch.random.fork_rng():
        seed = seed_of(random_state)
        torch.manual_seed(seed)
        small = _train(peft, small, train, int(steps), int(rank), learning_rate, batch_size, seed)
    after = mean_loss(small, held), mean_loss(small, seen)
    facts = {"steps": int(steps), "rank": int(rank), "learning_rate": learning_rate, "texts": digest(windows)}
    record = {"recovered": {**facts, "loss_before": before[0], "loss_after": after[0]}}
    setattr(small, RECORD, [*getattr(small, RECORD, []), record])
    return small, _table(before, after)


def _train(
    peft: Any, model: Any, windows: Tensor, steps: int, rank: int, learning_rate: float, batch_size: int, seed: int
) -> Any:
    targets = _targets(model)
    conv1d = any(type(model.get_submodule(t)).__name__ == "Conv1D" for t in targets)
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    options = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, fan_in_fan_out=conv1d, bias="none")
    tuned = peft.get_peft_model(model, options)
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: min((s + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, s - warm) / max(1, steps - warm)))),
    )
    order = torch.Generator().manual_seed(seed)
    tuned.train()
    for _ in bar(range(steps), desc="recover", leave=False):
        chosen = torch.randperm(len(windows), generator=order)[:batch_size]
        for ids in windows[chosen].to(input_device(model)).split(max(1, AT_ONCE // windows.shape[1])):
            loss = tuned(input_ids=ids, labels=ids).loss * (len(ids) / len(chosen))  # they are of one length
            if not torch.isfinite(loss):
                raise InputError(f"learning_rate={learning_rate}: the loss is no longer finite: use a smaller one")
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
    merged = tuned.merge_and_unload()
    for p, flag in trainable:
        p.requires_grad_(flag)
    return evaluation_mode(merged)


def _targets(model: nn.Module) -> list[str]:
    """Names of all MLP and attention projections."""
    names: set[str] = set()
    for layer in anatomy(model).layers:
        projections = [*layer.neuron_projections, *layer.heads, *([layer.out] if layer.out is not None else [])]
        names.update(p.path for p in projections)
    return sorted(names)


def _context(model: nn.Module) -> int:
    from llmbrain.anatomy.families import context_length

    return context_length(model) or 512


def _table(before: tuple[float, float], after: tuple[float, float]) -> pd.DataFrame:
    import pandas as pd

    rows = {"windows": ["held out", "trained on"], "before": map(math.exp, before), "after": map(math.exp, after)}
    return pd.DataFrame({k: list(v) for k, v in rows.items()})
