"""One clock for a comparison: which volumes are used, and how words, tokens and brains come to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_range
from llmbrain.brains.alignment import align, word_regressor
from llmbrain.brains.series import prepare
from llmbrain.scanning import Scan

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Clock:
    """Volumes of a scan in seconds of a story, and what is done alike to both brains.

    Attributes
    ----------
    tr, offset : float
        Seconds a volume; stimulus time of the first volume.
    n_volumes : int
        Of the scan, before any is left out.
    start, stop : int
        The volumes that are used.
    rule, aggregate, hrf : str
        See `llmbrain.brains.align`.
    high_pass : float or None
        Seconds.
    """

    tr: float
    n_volumes: int
    offset: float
    start: int
    stop: int
    rule: str
    aggregate: str
    hrf: str
    high_pass: float | None

    def __post_init__(self) -> None:
        check_range("drop", self.start, 0, self.n_volumes - 3)

    def cut(self, values: ArrayLike) -> Array:
        """The volumes that are used, of ``(..., n_volumes, columns)``."""
        return np.asarray(values, dtype=np.float64)[..., self.start : self.stop, :]

    def prepare(self, values: ArrayLike) -> Array:
        """High-pass and standardize what `cut`, `rate` or `of_tokens` gave."""
        return prepare(values, self.tr, high_pass=self.high_pass)

    def rate(self, words: pd.DataFrame, values: ArrayLike | None = None, *, convolve: bool = True) -> Array:
        """A value of every word (default: 1) at the volumes, after the response or resampled as it is."""
        hrf = self.hrf if convolve else None
        return self.cut(
            word_regressor(words, self.tr, self.n_volumes, values=values, rule=self.rule, hrf=hrf, offset=self.offset)
        )

    def of_tokens(
        self, scan: Scan, words: pd.DataFrame, series: ArrayLike, *, convolve: bool = True
    ) -> tuple[Array, dict[str, int]]:
        """Series on the tokens of a scan at the volumes, and what was counted on the way."""
        aligned = align(
            scan, words, self.tr, self.n_volumes, rule=self.rule, aggregate=self.aggregate,
            hrf=self.hrf if convolve else None, offset=self.offset, series=series,
        )  # fmt: skip
        return self.cut(aligned.data), aligned.report

    def given(self, name: str, values: ArrayLike) -> Array:
        """A control series that came from outside, one value a volume of the whole scan."""
        array = np.asarray(values, dtype=np.float64).reshape(-1, 1)
        if len(array) != self.n_volumes:
            raise InputError(f"controls[{name!r}] has {len(array)} values for {self.n_volumes} volumes")
        return self.cut(array)

    def settings(self) -> dict[str, float | str | None]:
        """What a report records."""
        return {
            "tr": self.tr, "n_volumes": self.n_volumes, "offset": self.offset, "rule": self.rule, "drop": self.start,
            "high_pass": self.high_pass, "hrf": self.hrf, "aggregate": self.aggregate,
        }  # fmt: skip
