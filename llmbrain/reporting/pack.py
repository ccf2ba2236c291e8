"""Maps and time courses as small as a page can carry them: one byte a value, deflated, base64.

A value becomes the index of the nearest entry of a codebook. The codebook is fine in proportion to the value where a
value means something, and as fine near zero as the page's budget allows: what decides the size of the file is the
background, which is most of a map and where nothing is read off.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

HALF = 127  # codes 1..127 above zero, -1..-127 below: one signed byte
KNEE = 2.0  # below this |z| the grid is even, above it grows by a fixed factor
STEPS = (0.05, 0.1, 0.25, 0.5, KNEE)  # grids near zero, finest first; with the last, all below the knee becomes 0


def codebook(largest: float, step: float) -> NDArray[np.float32]:
    """Values that the codes 0..127 stand for, ascending from 0 to at least `largest`; shape ``(128,)``."""
    even = np.arange(0, KNEE, step)
    grown = np.geomspace(KNEE, max(largest, 2 * KNEE), HALF + 1 - len(even))
    return np.concatenate([even, grown]).astype(np.float32)


def encode(values: ArrayLike, book: NDArray[np.float32]) -> NDArray[np.int8]:
    """Nearest code of each value; int8, same shape. Values that are not finite become 0."""
    values = np.nan_to_num(np.asarray(values, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    borders = (book[1:] + book[:-1]) / 2
    codes = np.searchsorted(borders, np.abs(values).ravel()).reshape(values.shape).astype(np.int8)
    if book[1] >= KNEE:
        codes[np.abs(values) < KNEE] = 0  # not rounded up to the knee
    return np.where(values < 0, -codes, codes).astype(np.int8)


def decode(codes: NDArray[np.int8], book: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the page shows for these codes."""
    return np.asarray(np.sign(codes) * book[np.abs(codes.astype(np.int16))], dtype=np.float32)


def blob(codes: NDArray[np.int8]) -> str:
    """Deflate (zlib) and base64: what ``DecompressionStream("deflate")`` reads back in a browser."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(codes).tobytes(), 6)).decode("ascii")


def pack_maps(maps: Sequence[ArrayLike] | NDArray[Any], budget: int = 7_800_000) -> dict[str, Any]:
    """Pack maps into at most about `budget` characters, as exactly as that allows.

    Parameters
    ----------
    maps : array ``(n_networks, n_neurons)``
    budget : int
        Characters of all blobs together; the coarsest grid is used even if it does not fit.

    Returns
    -------
    dict with ``book`` (128 numbers), ``blobs`` (one string a map), ``step`` (distance of values below 2)
    """
    rows = np.asarray(maps)
    largest = float(np.nanmax(np.where(np.isfinite(rows), np.abs(rows), 0))) if rows.size else 1.0
    sample = rows[:: max(1, len(rows) // 2)][:2]
    for step in STEPS:
        book = codebook(largest, step)
        if sum(len(blob(encode(row, book))) for row in sample) / len(sample) * len(rows) <= budget:
            break
    return {"book": [round(float(v), 4) for v in book], "step": step, "blobs": [blob(encode(r, book)) for r in rows]}
