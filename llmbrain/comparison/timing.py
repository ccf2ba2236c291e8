"""Do the times fit: is the word rate where the brain has it, with this offset and this repetition time."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llmbrain.brains.series import standardize
from llmbrain.comparison.ceilings import noise_ceilings
from llmbrain.comparison.clock import Clock
from llmbrain.comparison.coupling import couple, group_mean

Array = NDArray[np.float64]
SHARE, FEWEST = 0.05, 5  # regions with the highest ISC that are asked, of all and at least
FARTHEST = 30.0  # seconds of a wrong offset that are looked for
LEAST = 2.5  # seconds; less is how responses differ
BETTER = 1.3  # times the r that it has as it is
USUAL_TRS = (
    0.5,
    0.6,
    0.65,
    0.7,
    0.72,
    0.75,
    0.8,
    0.9,
    1.0,
    1.2,
    1.25,
    1.3,
    1.4,
    1.5,
    1.6,
    1.8,
    2.0,
    2.2,
    2.4,
    2.5,
    3.0,
)


def timing_cautions(words: pd.DataFrame, brain: Array, clock: Clock, random_state: int) -> list[str]:
    """What does not fit, in sentences.

    The regions with the highest inter-subject correlation follow the story, whatever in it; of one subject, all regions
    are taken. Their mean is read earlier and later, and with other usual repetition times with which the story fills
    the scan.

    Parameters
    ----------
    words : DataFrame
    brain : array ``(S, n_volumes, R)``
        The whole scans, as measured.
    clock : Clock
    """
    people = clock.prepare(clock.cut(brain))
    chosen = _followers(people)
    if not len(chosen):
        return []
    now = _fit(words, brain[..., chosen], clock, random_state)
    if now is None:
        return []
    r_now, best, r_best, threshold = now
    said = []
    better = _better_tr(words, brain[..., chosen], clock, max(r_now, r_best), threshold, random_state)
    if better is not None:
        said.append(
            f"the word rate fits better with a repetition time of {better:g} s, with which the words fill the "
            f"{clock.n_volumes} volumes: is tr={clock.tr:g} s right?"
        )
    elif abs(best) >= LEAST and r_best > threshold and r_best > BETTER * r_now:
        said.append(
            f"the word rate fits best when the brain is read {abs(best):g} s {'later' if best > 0 else 'earlier'}: is "
            f"offset={clock.offset:g} s right?"
        )
    return said


def _followers(people: Array) -> NDArray[np.int64]:
    """Regions with the highest inter-subject correlation; all that live, where there is one subject."""
    alive = np.flatnonzero(np.isfinite(people).all(axis=1).any(axis=0))
    n = max(FEWEST, round(SHARE * len(alive)))
    if len(people) < 2 or len(alive) <= n:
        return alive
    isc = noise_ceilings(people[..., alive], n_splits=1)["isc"].to_numpy()
    return alive[np.argsort(-np.nan_to_num(isc, nan=-1))[:n]]


def _fit(
    words: pd.DataFrame, brain: Array, clock: Clock, random_state: int
) -> tuple[float, float, float, float] | None:
    """r as it is, the best shift in seconds, r there, and |r| that 1% of moved word rates reach."""
    people = clock.prepare(clock.cut(brain))
    group = group_mean(people) if len(people) > 1 else people[0]
    group = group[:, np.isfinite(group).all(axis=0)]
    rate = clock.prepare(clock.rate(words))
    n, far = len(rate), int(FARTHEST / clock.tr)
    if not group.shape[1] or np.isnan(rate).any() or n < 40:
        return None
    follower = standardize(group.mean(axis=1))
    far = min(far, n // 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = couple(rate, follower, alpha=0.01, lags=range(-far, far + 1), random_state=random_state)
    profile = found.lag_r[:, 0, 0]
    best = int(np.argmax(profile))
    return float(profile[far]), float(found.lags[best]) * clock.tr, float(profile[best]), found.threshold


def _better_tr(
    words: pd.DataFrame, brain: Array, clock: Clock, r: float, threshold: float, random_state: int
) -> float | None:
    """A usual repetition time with which the story fills the scan and the word rate fits clearly better."""
    length = float(words["offset"].max()) - clock.offset
    if abs(np.log(clock.n_volumes * clock.tr / length)) < np.log(1.1):  # it fills the scan as it is
        return None
    best: tuple[float, float] | None = None
    for tr in USUAL_TRS:
        if tr == clock.tr or not 0.95 < clock.n_volumes * tr / length < 1.2:
            continue
        other = replace(clock, tr=tr, start=0, stop=clock.n_volumes)
        found = _fit(words, brain, other, random_state)
        if found is not None and found[0] > max(threshold, found[3]) and found[0] > BETTER * max(r, 0):
            best = max(best or (0.0, 0.0), (found[0], tr))
    return best[1] if best else None
