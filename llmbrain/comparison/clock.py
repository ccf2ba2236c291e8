"""One clock for a comparison: which volumes are used, and how words, tokens and brains come to them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_option, check_whole
from llmbrain.brains.alignment import align, word_regressor
from llmbrain.brains.series import prepare
from llmbrain.scanning import Scan

Array = NDArray[np.float64]
WINDOWS = ("stimulus", "all")
RISE = 16.0  # seconds until the response to something that goes on has risen
EDGE = 3.0  # seconds; a shorter silence is none


class Scanner(TypedDict):
    """Fields of `Clock` that do not depend on the story."""

    tr: float
    n_volumes: int
    offset: float
    rule: str
    aggregate: str
    hrf: str
    high_pass: float | None


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

    @classmethod
    def of_story(
        cls, words: pd.DataFrame, *, window: str = "stimulus", drop: int = 0, **settings: Unpack[Scanner]
    ) -> Clock:
        """A clock whose volumes are those of the story: from its first word and the response to it to its last word.

        A brain that answers to the beginning and the end of a story, and to nothing in it, goes up and down with every
        word rate, also with that of the mirrored story (`benchmarks/calibration.py`). So where the scan has silence or
        music before the first word, the volumes until 16 s after it are left out, when the response has risen; where it
        goes on, those after the last word. A scan that begins and ends with the story is used whole.

        Parameters
        ----------
        words : DataFrame
        window : {"stimulus", "all"}
        drop : int
            Volumes at the start that are not used in any case.
        """
        check_option("window", window, WINDOWS)
        tr, n_volumes, offset = settings["tr"], settings["n_volumes"], settings["offset"]
        check_whole("drop", drop, 0, n_volumes - 3)
        start, stop = int(drop), n_volumes
        times = offset + tr * np.arange(n_volumes)
        if window == "all":
            before, after = float(words["onset"].min()) - times[start], times[-1] - float(words["offset"].max())
            if max(before, after) > EDGE:
                warnings.warn(
                    f"window='all': {max(before, 0):.0f} s before the story and {max(after, 0):.0f} s after it are "
                    "used: regions that answer to its beginning or end will seem to follow its words", stacklevel=3,
                )  # fmt: skip
        else:
            first, last = float(words["onset"].min()), float(words["offset"].max())
            first = first + RISE if first - times[start] > EDGE else times[start]
            inside = np.flatnonzero((times >= max(first, times[start])) & (times <= last + EDGE))
            if len(inside) < 3:
                raise InputError(
                    f"words: {len(inside)} volumes of the scan are within the story: is offset={offset:g} s right?"
                )
            start, stop = int(inside[0]), int(inside[-1]) + 1
        return cls(start=start, stop=stop, **settings)

    @property
    def left_out(self) -> str:
        """What of the scan is not used, in words; nothing where all of it is."""
        pieces = [f"the first {self.start}"] if self.start else []
        pieces += [f"the last {self.n_volumes - self.stop}"] if self.stop < self.n_volumes else []
        return f"{' and '.join(pieces)} of {self.n_volumes} volumes" if pieces else ""

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
            "tr": self.tr, "n_volumes": self.n_volumes, "offset": self.offset, "rule": self.rule,
            "first_volume": self.start, "last_volume": self.stop - 1,
            "high_pass": self.high_pass, "hrf": self.hrf, "aggregate": self.aggregate,
        }  # fmt: skip
