"""What each network responds to: tokens, and conditions beside their control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llmbrain.networks.localizer import responses
from llmbrain.page.text import context_of

BLOCK = 16  # networks whose shifts are held at once
MIN_SHIFT = 10  # tokens; a smaller shift leaves the labels where they were


def counted(courses: Sequence[Any], scans: Sequence[Any] | None) -> NDArray[np.bool_]:
    """Which tokens of all runs together are a response (`llmbrain.networks.localizer.responses`); all of them where
    no scans belong to the courses, or none is."""
    lengths = [len(c) for c in courses]
    if not scans or [int(scan.n_tokens) for scan in scans] != lengths:
        return np.ones(sum(lengths), dtype=bool)
    found = np.concatenate([responses(scan) for scan in scans])
    return found if found.any() else ~found


def standardized(courses: Sequence[Any], scans: Sequence[Any] | None = None) -> list[NDArray[np.float32]]:
    """Time courses in standard deviations over all runs together, so that runs can be compared.

    Parameters
    ----------
    courses : list of arrays ``(n_tokens, n_networks)``
    scans : list of Scan, optional
        Of these tokens: mean and deviation are those of the tokens that are `counted`.
    """
    joined = np.concatenate([np.asarray(c, dtype=np.float64) for c in courses])[counted(courses, scans)]
    mean, spread = np.nanmean(joined, axis=0), np.nanstd(joined, axis=0)
    spread[spread == 0] = 1
    return [((np.asarray(c) - mean) / spread).astype(np.float32) for c in courses]


def labels_of(scan: Any) -> NDArray[np.object_]:
    """Condition of each token of a scan; None where none is on (the last one wins where two overlap)."""
    labels = np.full(int(scan.n_tokens), None, dtype=object)
    events = getattr(scan, "events", None)
    if events is None or "trial_type" not in getattr(events, "columns", ()):
        return labels
    for onset, duration, kind in events[["onset", "duration", "trial_type"]].itertuples(index=False):
        labels[max(0, int(onset)) : max(0, int(np.ceil(onset + max(duration, 1))))] = str(kind)
    return labels


def condition_effects(courses: Sequence[NDArray[np.float32]], scans: Sequence[Any]) -> pd.DataFrame:
    """How much more active each network is in one condition than in the others.

    The effect is a difference of means, in standard deviations of the time course. Its control: the same number after
    the labels of all runs were shifted in a circle against the series, by every shift of at least 10 tokens; this keeps
    the series' own memory, which a t test ignores. ``p = (b + 1) / (n + 1)``, where b counts the shifts whose largest
    ``|effect|`` over all networks and conditions reaches this one (family-wise error). All runs are shifted as one, so
    that runs of a single condition count too; `llmbrain.networks.localizer` fits a GLM within runs instead. The first
    token of a context block has no part in it.

    Parameters
    ----------
    courses : list of arrays ``(n_tokens, n_networks)``
    scans : list of Scan
        Their events name the conditions.

    Returns
    -------
    DataFrame
        Columns network, condition, tokens, effect, control (95% of the largest shifted ``|effect|``), p. Empty where
        fewer than two conditions have tokens or the series is too short to shift.
    """
    columns = ["network", "condition", "tokens", "effect", "control", "p"]
    counts = counted(courses, scans)
    labels = np.concatenate([labels_of(scan) for scan in scans])
    labels[~counts] = None
    series = np.where(counts[:, None], np.concatenate(standardized(courses, scans)), 0.0).astype(np.float64)
    kinds = sorted({kind for kind in labels if kind is not None})
    if len(kinds) < 2 or len(series) < 4 * MIN_SHIFT:
        return pd.DataFrame(columns=columns)
    labelled = np.array([kind is not None for kind in labels])
    n = len(series)
    weights = []
    for kind in kinds:
        inside = labels == kind
        outside = labelled & ~inside
        weights.append(np.conj(np.fft.rfft(inside / inside.sum() - outside / outside.sum()))[:, None])
    largest = np.zeros(n)
    effects = np.empty((len(kinds), series.shape[1]))
    for first in range(0, series.shape[1], BLOCK):
        part = slice(first, first + BLOCK)
        spectrum = np.fft.rfft(series[:, part], axis=0)
        for i, weight in enumerate(weights):
            # the effect at every circular shift is a cross-correlation: one FFT instead of n sums
            shifted = np.fft.irfft(spectrum * weight, n=n, axis=0)
            effects[i, part] = shifted[0]
            largest = np.maximum(largest, np.abs(shifted).max(axis=1))
    null = largest[MIN_SHIFT : n - MIN_SHIFT + 1]
    beaten = len(null) - np.searchsorted(np.sort(null), np.abs(effects) - 1e-12)
    p = (1 + beaten) / (1 + len(null))
    rows = [
        (k, kind, int((labels == kind).sum()), effects[i, k], float(np.quantile(null, 0.95)), p[i, k])
        for k in range(series.shape[1])
        for i, kind in enumerate(kinds)
    ]
    return pd.DataFrame(rows, columns=columns)


def top_tokens(networks: Any, k: int, scans: Sequence[Any], texts: Sequence[list[str]], n: int, sign: int = 1) -> Any:
    """`llmbrain.networks.top_tokens` with the text as the page shows it: run, token, value, before, text, after.

    Parameters
    ----------
    texts : list of list of str
        Shown text of the tokens of each run.
    """
    from llmbrain.networks import top_tokens as find

    places = find(networks[k], scans, n, sign=sign)[["run", "position", "value"]]
    found = []
    for run, token, value in places.itertuples(index=False, name=None):
        before, text, after = context_of(texts[run], token)
        found.append({"run": run, "token": token, "value": value, "before": before, "text": text, "after": after})
    return found


def token_types(
    courses: Sequence[NDArray[np.float32]],
    texts: Sequence[list[str]],
    n: int = 8,
    min_count: int = 3,
    scans: Sequence[Any] | None = None,
) -> list[list[tuple[str, float, int]]]:
    """Token types with the highest mean activity of each network: ``(text, mean, count)``.

    Parameters
    ----------
    courses : list of arrays ``(n_tokens, n_networks)``
    texts : list of list of str
        Shown text of the tokens of each run. Tokens without characters do not count.
    min_count : int
        Only types seen so often.
    scans : list of Scan, optional
        Of these tokens: only those that are `counted` count.
    """
    real = counted(courses, scans)
    kinds, kind_of, counts = np.unique(
        np.array([token for text in texts for token in text], dtype=object)[real],
        return_inverse=True,
        return_counts=True,
    )
    often = np.flatnonzero((counts >= min_count) & (kinds != ""))
    found = []
    for series in np.concatenate(courses)[real].T:
        means = np.bincount(kind_of, weights=series, minlength=len(kinds))[often] / counts[often]
        best = np.argsort(-means, kind="stable")[:n]
        found.append([(str(kinds[often[i]]), float(means[i]), int(counts[often[i]])) for i in best])
    return found
