"""Noise ceilings: how well one part of the data predicts another, the most that any model can be asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_range
from llmbrain.brains.series import standardize

Array = NDArray[np.float64]


def noise_ceilings(
    subjects: ArrayLike, *, n_splits: int = 200, regions: Sequence[str] | None = None, random_state: int | None = 0
) -> pd.DataFrame:
    """Inter-subject correlation and split-half reliability of each region.

    Parameters
    ----------
    subjects : array ``(S, T, R)``
        Filtered alike; standardised here. At least 2 subjects.
    n_splits : int
        Random splits into two halves of ``S // 2`` subjects.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.

    Returns
    -------
    DataFrame, one row a region
        ``isc``: mean correlation of a subject with the mean of the others (lower bound for one subject);
        ``isc_upper``: the same with a mean that contains the subject; ``split_half``: mean correlation of two halves;
        ``reliability``: its Spearman-Brown value for the mean of the whole group, ``k r / (1 + (k - 1) r)`` with k the
        size of the group over that of a half (2, or 3 for three subjects); ``ceiling``: the square
        root of that, which a perfect model of the group mean would reach; NaN where the reliability is not above 0.
    """
    z = standardize(subjects)
    if z.ndim != 3 or len(z) < 2:
        raise InputError(
            f"subjects of shape {np.shape(subjects)} must be (subjects, volumes, regions), at least 2 subjects"
        )
    n_subjects, _, n_regions = z.shape
    live = np.isfinite(z).all(axis=1)
    filled = np.nan_to_num(z)
    total = filled.sum(axis=0)
    # a dead series of one subject is left out of both the subject's r and the others' mean
    isc = np.stack([_r(s, total - s) for s in filled])
    upper = np.stack([_r(s, total) for s in filled])
    isc[~live], upper[~live] = np.nan, np.nan
    rng = np.random.default_rng(random_state)
    half = n_subjects // 2
    splits = []
    for _ in range(n_splits):
        order = rng.permutation(n_subjects)
        splits.append(_r(filled[order[:half]].sum(axis=0), filled[order[half : 2 * half]].sum(axis=0)))
    split = nanmean(np.array(splits))
    k = n_subjects / half  # an odd group is more than two halves
    reliability = k * split / (1 + (k - 1) * split)
    frame = pd.DataFrame({
        "region": list(regions) if regions is not None else [f"region{i}" for i in range(n_regions)],
        "n_subjects": live.sum(axis=0), "isc": nanmean(isc), "isc_upper": nanmean(upper), "split_half": split,
        "reliability": reliability, "ceiling": np.sqrt(np.where(reliability > 0, reliability, np.nan)),
    })  # fmt: skip
    return frame


def isc_split(subjects: ArrayLike, least: float) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Regions that one half of the listeners choose by their inter-subject correlation, for the other half.

    A region that is chosen and tested in the same people looks better than it is, since their noise chose it.

    Parameters
    ----------
    subjects : array ``(S, T, R)``
        Filtered alike. At least 4; the first, third, fifth choose.
    least : float
        Mean leave-one-out correlation that a region needs, between 0 and 1.

    Returns
    -------
    keep : bool array ``(R,)``
    rest : int array
        Places of the subjects that did not choose.
    """
    people = np.asarray(subjects, dtype=np.float64)
    check_range("isc", least, 0, 1)
    if people.ndim != 3 or len(people) < 4:
        raise InputError(f"isc: {len(people)} subjects are too few to let one half choose for the other: 4 are needed")
    isc = noise_ceilings(people[::2], n_splits=1)["isc"].to_numpy()
    return np.nan_to_num(isc, nan=-1.0) >= least, np.arange(1, len(people), 2)


def _r(a: Array, b: Array) -> Array:
    """Correlation of matching columns; NaN where one is constant."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    norm = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
    return np.divide((a * b).sum(axis=0), norm, out=np.full(a.shape[1], np.nan), where=norm > 1e-12)


def nanmean(values: Array) -> Array:
    """Mean over the first axis without NaN; NaN, and no warning, where there is nothing else."""
    count = np.isfinite(values).sum(axis=0)
    return np.divide(np.nansum(values, axis=0), count, out=np.full(values.shape[1], np.nan), where=count > 0)
