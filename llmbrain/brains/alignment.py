"""One clock for both brains: tokens to words by their characters, words to volumes by their times."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from llmbrain._validation import InputError, check_option, check_range, check_whole
from llmbrain.brains.finding import find_words
from llmbrain.brains.hrf import HRFS, add_delays, hrf_weights, lanczos_weights
from llmbrain.brains.series import check_tr, high_pass_filter
from llmbrain.brains.words import check_words

if TYPE_CHECKING:
    from llmbrain.scanning import Scan

Array = NDArray[np.float64]
RULES = ("offset", "onset", "midpoint")
AGGREGATES = ("mean", "last", "sum")


@dataclass
class Aligned:
    """Series of a model at the volumes of a scan; `numpy.asarray` gives `data`.

    Attributes
    ----------
    data : array ``(n_volumes, n_columns)``
    words : DataFrame
        The word table with ``start``, ``end`` (characters of the text, -1 where not found) and ``n_tokens``.
    report : dict
        What was counted: ``n_words``, ``untimed`` (no onset or offset), ``not_in_text``, ``outside_scan``, ``used``,
        and ``tokens_unused`` (punctuation, special tokens; with "last", all but the last of a word).
    """

    data: Array
    words: pd.DataFrame = field(repr=False)
    report: dict[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `data`."""
        return self.data.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.data, dtype=dtype, copy=True if copy is None else copy)


def align(
    scan: Scan,
    words: pd.DataFrame,
    tr: float,
    n_volumes: int,
    *,
    rule: str = "offset",
    aggregate: str = "mean",
    hrf: str | None = "spm",
    delays: Sequence[int] | None = None,
    offset: float = 0.0,
    high_pass: float | None = None,
    drop: int = 0,
    series: ArrayLike | None = None,
) -> Aligned:
    """Bring what a model did at every token to the volumes of an fMRI scan of someone who heard the same words.

    Parameters
    ----------
    scan : Scan
        Knows the text and where in it each token lies.
    words : DataFrame
        ``word``, ``onset``, ``offset`` in seconds, from `load_words`; words without times are dropped and counted.
    tr : float
        Seconds.
    n_volumes : int
    rule : {"offset", "onset", "midpoint"}
        When in a word its value counts.
    aggregate : {"mean", "last", "sum"}
        Of the tokens of a word.
    hrf : {"spm", "glover"} or None
        Convolve with this response; None resamples with a Lanczos window, to be used with `delays`.
    delays : sequence of int, optional
        Copies so many volumes later (finite impulse response); only with ``hrf=None``.
    offset : float
        Stimulus time of the first volume, in seconds. Volumes are sampled at their start; add ``tr / 2`` for their
        middle.
    high_pass : float, optional
        Cut-off period in seconds; give the brain the same.
    drop : int
        Volumes to leave out at the start, before the filter; drop the same ones of the brain.
    series : array ``(n_tokens, K)``, optional
        Time courses of networks on the tokens of `scan`. Default: every neuron of the scan, read in pieces.

    Returns
    -------
    Aligned
        Silence, and words that the text does not have, count 0.

    Raises
    ------
    InputError
        If the words do not occur in the text, none falls into the scan, or the series do not belong to the tokens.
    """
    check_option("aggregate", aggregate, AGGREGATES)
    check_whole("n_volumes", n_volumes, 1)
    check_whole("drop", drop, 0, n_volumes - 1)
    words = check_words(words)
    at_volumes = volume_weights(words, tr, n_volumes, rule=rule, hrf=hrf, delays=delays, offset=offset)
    spans = find_words(scan.text, words["word"])
    of_words, counts = _word_weights(token_spans(scan), spans, aggregate)
    weights = (at_volumes @ of_words).tocsr()

    found, timed = spans[:, 0] >= 0, words["offset"].notna().to_numpy()
    heard = np.zeros(len(words), dtype=bool)
    heard[at_volumes.tocoo().coords[1]] = True
    report = {
        "n_words": len(words), "untimed": int((~timed).sum()), "not_in_text": int((~found).sum()),
        "outside_scan": int((timed & ~heard).sum()), "used": int((heard & (counts > 0)).sum()),
        "tokens_unused": int(scan.n_tokens - len(np.unique(of_words.tocoo().coords[1]))),
    }  # fmt: skip
    if report["not_in_text"] == len(words):
        raise InputError(
            f"words: none of {len(words)} is in the scan's text, which begins {scan.text[:40]!r}; the first word is "
            f"{words['word'].iloc[0]!r}: is it the same story, in the same script?"
        )
    if report["used"] == 0:
        raise InputError(
            f"words: none of {len(words)} is both in the text and in the scan: {report}; is offset={offset:g} s right?"
        )
    if report["not_in_text"] > len(words) / 2:
        warnings.warn(f"words: {report['not_in_text']} of {len(words)} are not in the scan's text", stacklevel=2)

    if series is None:
        values = np.zeros((n_volumes, scan.n_neurons))
        for part, block in scan.iter_data():
            values += weights[:, part] @ block
    else:
        given = np.asarray(series, dtype=np.float64)
        given = given[:, None] if given.ndim == 1 else given
        if given.ndim != 2 or len(given) != scan.n_tokens:
            raise InputError(f"series of shape {np.shape(series)} must be ({scan.n_tokens} tokens, columns)")
        values = weights @ given
    data = _finish(values, tr, delays, high_pass, drop)
    return Aligned(data, words.assign(start=spans[:, 0], end=spans[:, 1], n_tokens=counts), report)


def word_regressor(
    words: pd.DataFrame,
    tr: float,
    n_volumes: int,
    *,
    values: ArrayLike | None = None,
    rule: str = "offset",
    hrf: str | None = "spm",
    delays: Sequence[int] | None = None,
    offset: float = 0.0,
    high_pass: float | None = None,
    drop: int = 0,
) -> Array:
    """A value of every word at the volumes of a scan; with no `values`, the word rate. Parameters as in `align`.

    Parameters
    ----------
    values : array ``(n_words,)`` or ``(n_words, K)``, optional
        NaN counts as the mean of the others.

    Returns
    -------
    array ``(n_volumes - drop, K)``
    """
    words = check_words(words)
    weights = volume_weights(words, tr, n_volumes, rule=rule, hrf=hrf, delays=delays, offset=offset)
    table = np.ones((len(words), 1)) if values is None else np.asarray(values, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if len(table) != len(words):
        raise InputError(f"values has {len(table)} rows for {len(words)} words")
    empty = np.isnan(table).all(axis=0)
    if empty.any():
        raise InputError(f"values: column {int(np.argmax(empty))} has no number in it")
    table = np.where(np.isnan(table), np.nanmean(table, axis=0), table)
    return _finish(weights @ table, tr, delays, high_pass, drop)


def volume_weights(
    words: pd.DataFrame,
    tr: float,
    n_volumes: int,
    *,
    rule: str = "offset",
    hrf: str | None = "spm",
    delays: Sequence[int] | None = None,
    offset: float = 0.0,
) -> csr_array:
    """What each word contributes to each volume (before delays); sparse ``(n_volumes, n_words)``, see `align`."""
    tr = check_tr(tr)
    check_option("rule", rule, RULES)
    check_option("hrf", hrf, (*HRFS, None))
    check_range("offset", offset)
    if hrf is not None and delays is not None:
        raise InputError(
            f"delays={list(delays)!r} go with hrf=None: hrf={hrf!r} has the delay of the response in it already"
        )
    onset, end = words["onset"].to_numpy(float), words["offset"].to_numpy(float)
    times = {"offset": end, "onset": onset, "midpoint": (onset + end) / 2}[rule]
    timed = np.flatnonzero(np.isfinite(times))
    volumes = offset + tr * np.arange(n_volumes)
    if hrf is None:
        weights = lanczos_weights(times[timed], volumes, tr)
    else:
        weights = hrf_weights(times[timed], volumes, hrf)
    coo = weights.tocoo()
    return csr_array((coo.data, (coo.coords[0], timed[coo.coords[1]])), shape=(n_volumes, len(words)))


def _finish(values: Array, tr: float, delays: Sequence[int] | None, high_pass: float | None, drop: int) -> Array:
    if delays is not None:
        values = add_delays(values, delays)
    values = values[int(drop) :]
    return values if high_pass is None else high_pass_filter(values, tr, high_pass)


# -- characters --------------------------------------------------------------------------------------------------------


def token_spans(scan: Scan) -> NDArray[np.int64]:
    """Characters of each token, trimmed of white space, ``(n_tokens, 2)``; start = end for special tokens."""
    if not scan.text:
        raise InputError(f"scan {scan.name!r} does not know its text: it cannot be aligned with words")
    if scan.offsets is None:
        raise InputError(f"scan {scan.name!r} has no character offsets: scan again with a fast tokenizer")
    spans = scan.offsets.copy()
    for i, (a, b) in enumerate(spans):
        piece = scan.text[a:b]
        spans[i] = a + len(piece) - len(piece.lstrip()), b - len(piece) + len(piece.rstrip())
    spans[spans[:, 1] <= spans[:, 0]] = 0
    return spans


def _word_weights(
    tokens: NDArray[np.int64], words: NDArray[np.int64], aggregate: str
) -> tuple[csr_array, NDArray[np.int64]]:
    """Sparse ``(n_words, n_tokens)`` that aggregates tokens to words, and the number of tokens of each word."""
    real = np.flatnonzero(tokens[:, 1] > tokens[:, 0])
    real = real[np.argsort(tokens[real, 0], kind="stable")]
    starts, ends = tokens[real, 0], np.maximum.accumulate(tokens[real, 1])
    first = np.searchsorted(ends, words[:, 0], side="right")
    last = np.searchsorted(starts, words[:, 1], side="left")
    counts = np.where(words[:, 0] >= 0, np.maximum(last - first, 0), 0)
    if aggregate == "last":
        chosen = np.flatnonzero(counts)
        rows, columns, data = chosen, real[last[chosen] - 1], np.ones(len(chosen))
    else:
        rows = np.repeat(np.arange(len(words)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = real[np.repeat(first, counts) + within]
        data = np.ones(len(rows)) if aggregate == "sum" else 1.0 / np.repeat(counts, counts)
    return csr_array((data, (rows, columns)), shape=(len(words), len(tokens))), counts
