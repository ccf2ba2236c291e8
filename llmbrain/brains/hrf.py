"""From events to volumes: haemodynamic responses and Lanczos resampling, both exact at any event time.

A series of values at irregular times ``s_j`` becomes one value a volume as ``sum_j kernel(t_k - s_j) value_j``: a
sparse matrix (volumes x events) holds ``kernel(t_k - s_j)``, so there is no time grid and nothing is rounded to one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.stats import gamma

from llmbrain._validation import InputError, check_option, check_range

Array = NDArray[np.float64]
HRF_LENGTH = 32.0  # seconds, SPM's
LANCZOS_LOBES = 3


def double_gamma(
    times: ArrayLike,
    *,
    peak: float = 6.0,
    undershoot: float = 16.0,
    peak_dispersion: float = 1.0,
    undershoot_dispersion: float = 1.0,
    ratio: float = 6.0,
) -> Array:
    """SPM's response to a very short event: one gamma density less another one.

    Parameters
    ----------
    times : array
        Seconds after the event.
    peak, undershoot : float
        Delays of the response and of its undershoot, in seconds.
    peak_dispersion, undershoot_dispersion : float
        Their widths, in seconds.
    ratio : float
        Response over undershoot.

    Returns
    -------
    array of the shape of `times`, in 1/seconds; 0 before the event

    Notes
    -----
    ``spm_hrf.m``: ``gamma(t; p1/p3, p3) - gamma(t; p2/p4, p4) / p5``. nilearn's functions of the same name sample this
    curve one fine step late, on a grid slightly wider than the step, and with 0.167 for 1/6; the defaults here are
    SPM's.
    """
    for name, value in (("peak", peak), ("undershoot", undershoot), ("ratio", ratio)):
        check_range(name, value, 0, open_low=True)
    times = np.asarray(times, dtype=np.float64)
    response = gamma.pdf(times, peak / peak_dispersion, scale=peak_dispersion)
    return response - gamma.pdf(times, undershoot / undershoot_dispersion, scale=undershoot_dispersion) / ratio


def spm_hrf(times: ArrayLike) -> Array:
    """SPM's canonical response (delays 6 and 16 s, ratio 6); see `double_gamma`."""
    return double_gamma(times)


def glover_hrf(times: ArrayLike) -> Array:
    """Glover's response (1999) with nilearn's parameters: delays 6 and 12 s, dispersions .9 s, undershoot .48."""
    return double_gamma(times, undershoot=12.0, peak_dispersion=0.9, undershoot_dispersion=0.9, ratio=1 / 0.48)


HRFS: dict[str, Callable[[ArrayLike], Array]] = {"spm": spm_hrf, "glover": glover_hrf}


def hrf_weights(event_times: ArrayLike, volume_times: ArrayLike, hrf: str = "spm") -> csr_array:
    """Response of every volume to every event.

    Parameters
    ----------
    event_times : array ``(n_events,)``
        Seconds, in any order.
    volume_times : array ``(n_volumes,)``
        Seconds, on the same clock.
    hrf : {"spm", "glover"}

    Returns
    -------
    sparse array ``(n_volumes, n_events)``
        ``hrf(volume time - event time)`` for events of the last 32 s, in 1/seconds.
    """
    curve = HRFS[check_option("hrf", hrf, HRFS)]
    return _weights(event_times, volume_times, curve, 0.0, HRF_LENGTH)


def lanczos_weights(event_times: ArrayLike, volume_times: ArrayLike, tr: float) -> csr_array:
    """Lanczos resampling of events to volumes: a low-pass at the Nyquist frequency ``1 / (2 tr)`` with three lobes.

    Values of events are summed, not averaged, as in the story-listening models of the Huth lab (2016).

    Returns
    -------
    sparse array ``(n_volumes, n_events)``
    """

    def kernel(seconds: ArrayLike) -> Array:
        x = np.asarray(seconds) / tr
        return np.sinc(x) * np.sinc(x / LANCZOS_LOBES)

    return _weights(event_times, volume_times, kernel, -LANCZOS_LOBES * tr, LANCZOS_LOBES * tr)


def _weights(
    event_times: ArrayLike, volume_times: ArrayLike, kernel: Callable[[ArrayLike], Array], first: float, last: float
) -> csr_array:
    """``kernel(volume - event)`` for the pairs whose difference is within [first, last]."""
    events, volumes = np.asarray(event_times, dtype=np.float64), np.asarray(volume_times, dtype=np.float64)
    order = np.argsort(events, kind="stable")
    low = np.searchsorted(events[order], volumes - last, side="left")
    high = np.searchsorted(events[order], volumes - first, side="right")
    counts = high - low
    rows = np.repeat(np.arange(len(volumes)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    columns = order[np.repeat(low, counts) + within]
    return csr_array((kernel(volumes[rows] - events[columns]), (rows, columns)), shape=(len(volumes), len(events)))


def add_delays(series: ArrayLike, delays: Sequence[int]) -> Array:
    """Copies of a series, each later by a number of volumes (a finite impulse response design).

    Parameters
    ----------
    series : array ``(n_volumes, n_columns)``
    delays : sequence of int
        Volumes; negative ones look ahead.

    Returns
    -------
    array ``(n_volumes, n_columns * len(delays))``
        All columns at the first delay, then all at the second, and so on; 0 where there is no volume to copy.
    """
    series = np.asarray(series, dtype=np.float64)
    if not len(delays) or any(int(d) != d or abs(d) >= len(series) for d in delays):
        raise InputError(
            f"delays={list(delays)!r} must be whole numbers of volumes, fewer than the {len(series)} there are"
        )
    blocks = []
    for delay in (int(d) for d in delays):
        block = np.zeros_like(series)
        block[max(delay, 0) : len(series) + min(delay, 0)] = series[max(-delay, 0) : len(series) - max(delay, 0)]
        blocks.append(block)
    return np.concatenate(blocks, axis=1)
