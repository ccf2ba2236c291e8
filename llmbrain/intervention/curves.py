"""Dose and response: how much must be kept, how far can be amplified, each beside random neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from llmbrain._validation import InputError, check_range, numbers, seed_of
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.intervention.controls import random_masks
from llmbrain.intervention.evaluations import as_evaluations, score_conditions
from llmbrain.intervention.targets import neuron_mask
from llmbrain.networks import FunctionalNetworks
from llmbrain.stats.bootstrap import bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
GAINS = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)


def keep_only_curve(
    model: nn.Module,
    what: FunctionalNetworks | ArrayLike,
    evaluations: Mapping[str, Any],
    *,
    shares: Sequence[float] = SHARES,
    tokenizer: PreTrainedTokenizerBase | None = None,
    n_random: int = 10,
    window: int | None = None,
    max_windows: int | None = None,
    random_state: int | None = 0,
) -> pd.DataFrame:
    """Score against the share of neurons kept, the highest ranked first; all others are zero.

    Parameters
    ----------
    what : FunctionalNetworks or array ``(n_neurons,)``
        A rank for every neuron: its largest ``|z|`` over the networks, or the numbers given.
    shares : sequence of float
        Shares of all neurons, in (0, 1].
    n_random : int
        Controls a share: as many neurons in every layer, at random.
    window : int, optional
        Tokens in a window of text; default what the model can read at once.
    max_windows : int, optional
        Windows that are read; default all.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.

    Returns
    -------
    DataFrame
        share, n_kept, evaluation, score, score_low, score_high (95 % bootstrap over items), random_mean, random_low,
        random_high (mean and extremes over draws; nan without any), p (``(b + 1) / (n + 1)``, b the draws that are at
        least as near to the intact score), intact.
    """
    shares = numbers("shares", shares)
    for share in shares:
        check_range("shares", share, 0, 1, open_low=True)
    space = NeuronSpace(anatomy(model).widths)
    rank = _rank(what, space)
    order = np.argsort(-rank, kind="stable")
    masks = np.zeros((len(shares), space.n_neurons), dtype=bool)
    for mask, share in zip(masks, shares):
        mask[order[: max(1, round(share * space.n_neurons))]] = True
    return keep_masks_curve(
        model, masks, evaluations, tokenizer=tokenizer, n_random=n_random, window=window, max_windows=max_windows,
        random_state=random_state,
    )  # fmt: skip


def keep_masks_curve(
    model: nn.Module,
    masks: Sequence[Any] | NDArray[np.bool_],
    evaluations: Mapping[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    n_random: int = 10,
    window: int | None = None,
    max_windows: int | None = None,
    random_state: int | None = 0,
) -> pd.DataFrame:
    """`keep_only_curve` for sets of your own choice: one row a set (anything `keep_only` takes) and evaluation."""
    random_state = seed_of(random_state)
    space = NeuronSpace(anatomy(model).widths)
    ready = as_evaluations(model, evaluations, tokenizer, window=window, max_windows=max_windows)
    intact = score_conditions(model, np.ones((1, space.n_neurons)), ready)
    rows: list[dict[str, Any]] = []
    for i, what in enumerate(masks):
        mask = neuron_mask(what, space, f"masks[{i}]")
        controls = random_masks(mask, space, n_random, np.random.default_rng([random_state, i]))
        scores = score_conditions(model, np.concatenate([mask[None], controls]), ready)
        labels = {"share": mask.sum() / space.n_neurons, "n_kept": int(mask.sum())}
        rows += _rows(labels, scores, intact, random_state)
    return _frame(rows)


def amplification_curve(
    model: nn.Module,
    what: Any,
    evaluations: Mapping[str, Any],
    *,
    gains: Sequence[float] = GAINS,
    tokenizer: PreTrainedTokenizerBase | None = None,
    n_random: int = 10,
    window: int | None = None,
    max_windows: int | None = None,
    random_state: int | None = 0,
) -> pd.DataFrame:
    """Score against the gain of one set of neurons, beside the same gain on random sets (the same ones at every gain).

    Parameters
    ----------
    what : anything that `amplify` takes, but heads
    window : int, optional
        Tokens in a window of text; default what the model can read at once.
    max_windows : int, optional
        Windows that are read; default all.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.

    Returns
    -------
    DataFrame
        gain, size, and the columns of `keep_only_curve` from evaluation on.
    """
    random_state = seed_of(random_state)
    gains = [float(check_range("gains", gain)) for gain in numbers("gains", gains)]
    space = NeuronSpace(anatomy(model).widths)
    mask = neuron_mask(what, space)
    if not mask.any():
        raise InputError("what holds no neuron: there is nothing to amplify")
    ready = as_evaluations(model, evaluations, tokenizer, window=window, max_windows=max_windows)
    intact = score_conditions(model, np.ones((1, space.n_neurons)), ready)
    sets = np.concatenate([mask[None], random_masks(mask, space, n_random, np.random.default_rng(random_state))])
    rows: list[dict[str, Any]] = []
    for gain in gains:
        scores = score_conditions(model, np.where(sets, np.float32(gain), np.float32(1)), ready)
        rows += _rows({"gain": gain, "size": int(mask.sum())}, scores, intact, random_state)
    return _frame(rows)


def _rank(what: FunctionalNetworks | ArrayLike, space: NeuronSpace) -> NDArray[np.float64]:
    if isinstance(what, FunctionalNetworks):
        neuron_mask(what, space)  # names another space
        return np.abs(what.maps).max(axis=0).astype(np.float64)
    rank = np.asarray(what, dtype=np.float64)
    if rank.shape != (space.n_neurons,) or not np.isfinite(rank).all():
        raise InputError(f"what of shape {rank.shape} must be one finite number a neuron: ({space.n_neurons},)")
    return rank


def _rows(
    labels: dict[str, Any],
    scores: Mapping[str, NDArray[np.float64]],
    intact: Mapping[str, NDArray[np.float64]],
    random_state: int,
) -> list[dict[str, Any]]:
    rows = []
    for name, items in scores.items():
        own, null = items[0].mean(), items[1:].mean(axis=1)
        low, high = bootstrap_mean(items[0], 2000, 0.95, np.random.default_rng(random_state))
        whole = intact[name].mean()
        # What counts against a set: random ones that are as near to the intact model.
        reached = (np.abs(null - whole) <= np.abs(own - whole) * (1 + 1e-6)).sum()
        extremes = (null.mean(), null.min(), null.max()) if len(null) else (np.nan,) * 3
        rows.append(
            {
                **labels, "evaluation": name, "score": own, "score_low": low, "score_high": high,
                "random_mean": extremes[0], "random_low": extremes[1], "random_high": extremes[2],
                "p": (reached + 1) / (len(null) + 1) if len(null) else np.nan, "intact": whole,
            }
        )  # fmt: skip
    return rows


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows)
