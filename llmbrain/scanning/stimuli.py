"""Stimuli: a text that knows which of its tokens belong to which condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llmbrain._validation import InputError
from llmbrain.hooks.text import encode

EVENT_COLUMNS = ("onset", "duration", "trial_type")


class Stimulus(str):
    """A text to scan, with its events. It is a `str`, so that it goes wherever a text goes.

    Parameters
    ----------
    text : str
    events : DataFrame, optional
        Columns ``onset`` and ``duration`` (in tokens, as the scanner tokenises: with the tokenizer's default special
        tokens, so that a begin-of-sequence token is token 0) and ``trial_type`` (the condition).
    name : str, optional
        What the run is called; default: its place in the study.

    Raises
    ------
    InputError
        If the events lack a column, or an onset or duration is negative.
    """

    events: pd.DataFrame | None
    name: str | None

    def __new__(cls, text: str, events: pd.DataFrame | None = None, name: str | None = None) -> Stimulus:
        if not isinstance(text, str):
            raise InputError(f"text={text!r} must be a string")
        stimulus = super().__new__(cls, text)
        stimulus.events = None if events is None else check_events(events)
        stimulus.name = name
        return stimulus

    @classmethod
    def from_segments(
        cls, segments: Sequence[tuple[str, str | None]], tokenizer: Any, name: str | None = None
    ) -> Stimulus:
        """Join pieces of text, each with its condition; the tokens of a piece become one event.

        A token that lies across the border of two pieces belongs to the one that has more of its characters.

        Parameters
        ----------
        segments : sequence of (text, condition)
            Texts are joined as they are: spaces between them are yours to write. Condition None: no event.
        tokenizer : PreTrainedTokenizerFast
            The one the text will be scanned with.
        name : str, optional

        Raises
        ------
        InputError
            If there is no segment, a segment has no token of its own, or the tokenizer knows no character offsets.
        """
        segments = list(segments)
        if not segments or not all(isinstance(text, str) and text for text, _ in segments):
            raise InputError("segments must be (text, condition) pairs with texts that are not empty, at least one")
        text = "".join(piece for piece, _ in segments)
        borders = np.cumsum([0] + [len(piece) for piece, _ in segments])
        _, offsets, _ = encode(tokenizer, [text])[0]
        if offsets is None:
            raise InputError(f"tokenizer={type(tokenizer).__name__} knows no character offsets: use a fast tokenizer")
        owner = _owners(offsets, borders)
        rows = []
        for k, (piece, condition) in enumerate(segments):
            tokens = np.flatnonzero(owner == k)
            if condition is None:
                continue
            if not len(tokens):
                raise InputError(f"segments[{k}]={piece!r} has no token of its own with this tokenizer")
            rows.append((int(tokens[0]), int(tokens[-1] - tokens[0] + 1), str(condition)))
        return cls(text, pd.DataFrame(rows, columns=list(EVENT_COLUMNS)), name)


def _owners(offsets: NDArray[np.int64], borders: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which segment has most of each token's characters; -1 for tokens without characters."""
    start, end = offsets[:, :1], offsets[:, 1:]
    shared = np.minimum(end, borders[1:]) - np.maximum(start, borders[:-1])
    return np.where((end > start)[:, 0], shared.argmax(axis=1), -1)


def check_events(events: Any) -> pd.DataFrame:
    """Events as a table with the columns ``onset``, ``duration``, ``trial_type`` first, sorted by onset."""
    table = pd.DataFrame(events)
    missing = [name for name in EVENT_COLUMNS if name not in table.columns]
    if missing:
        raise InputError(f"events lacks the column {missing[0]!r}: needed are {', '.join(EVENT_COLUMNS)} (in tokens)")
    times = table[["onset", "duration"]].apply(pd.to_numeric, errors="coerce")
    bad = ~(np.isfinite(times) & (times >= 0)).all(axis=1)
    if bad.any():
        onset, duration = times[bad].iloc[0].tolist()
        raise InputError(f"events: onset={onset:g}, duration={duration:g} must be numbers >= 0, in tokens")
    table = table[[*EVENT_COLUMNS, *(c for c in table.columns if c not in EVENT_COLUMNS)]]
    return table.sort_values("onset", kind="stable").reset_index(drop=True)
