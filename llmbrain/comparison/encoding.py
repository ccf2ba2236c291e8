"""Encoding models: how well features of a model predict held-out brain activity, beyond controls and beyond chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import (
    InputError,
    check_count,
    check_option,
    check_range,
    check_whole,
    numbers,
    seed_of,
    soft_import,
)
from llmbrain.brains.hrf import add_delays
from llmbrain.brains.series import check_series, check_tr, slow_cosines
from llmbrain.stats.nulls import CORRECTIONS, NULLS, missing_cosines, surrogates, warn_if_too_smooth
from llmbrain.stats.tails import benjamini_hochberg, permutation_p

Array = NDArray[np.float64]
Fold = tuple[NDArray[np.int64], NDArray[np.int64]]
DEFAULT_ALPHAS = tuple(float(a) for a in np.logspace(-2, 6, 9))
GAP_SECONDS = 16.0  # a response is over by then
_BATCH = 4000  # targets that are fitted at once


@dataclass
class Encoding:
    """Held-out predictions of an encoding model. Scores are Pearson r, one per target; NaN for a dead target.

    Attributes
    ----------
    r : array ``(R,)``
        Mean over folds of the correlation of prediction and measurement within the held-out volumes.
    fold_r : array ``(n_folds, R)``
    p, p_corrected : arrays ``(R,)``
        Of `r`; ``(b + 1) / (n + 1)`` against the same model fitted to brains moved in time.
    band_r : dict of array ``(R,)``
        Score of what each band of features contributes to the prediction, alone.
    gain : dict of array ``(R,)``
        How much lower the score is without the band's share of the prediction. Empty for a single band.
    gain_p, gain_p_corrected : dict of array ``(R,)``
        For the `tested` bands.
    null_max : array ``(n_permutations,)``
        Largest `r` of all targets in each draw.
    prediction : array ``(T, R)``
        Held-out prediction in units of the targets, without their mean.
    parts : dict of array ``(T, R)``
        What each band contributes to it.
    blocks : list of int array
        Volumes of each held-out block.
    penalties : array ``(n_folds, n_bands, R)``
        Ridge penalty of each band and target (for features with unit variance, divided by the root of their number).
    """

    r: Array
    fold_r: Array
    p: Array
    p_corrected: Array
    band_r: dict[str, Array]
    gain: dict[str, Array]
    gain_p: dict[str, Array]
    gain_p_corrected: dict[str, Array]
    null_max: Array
    prediction: Array = field(repr=False)
    penalties: Array = field(repr=False)
    parts: dict[str, Array] = field(repr=False)
    blocks: list[NDArray[np.int64]] = field(repr=False)
    targets: list[str]
    ceiling: Array | None = None

    def subject_gain(self, subjects: ArrayLike, band: str) -> Array:
        """Gain of a band in each subject, with the prediction that was fitted to other volumes of the group.

        Parameters
        ----------
        subjects : array ``(S, T, R)``
            Filtered as the targets were.
        band : str

        Returns
        -------
        array ``(S, R)``
            NaN where a series is dead.
        """
        check_option("band", band, self.parts)
        without = self.prediction - self.parts[band]
        gains = []
        for own in np.asarray(subjects, dtype=np.float64):
            both = [
                np.mean([_columns_r(p[b], own[b]) for b in self.blocks], axis=0) for p in (self.prediction, without)
            ]
            gains.append(np.where(np.isfinite(own).all(axis=0), both[0] - both[1], np.nan))
        return np.stack(gains)

    def to_frame(self) -> pd.DataFrame:
        """One row a target."""
        frame = pd.DataFrame({"target": self.targets, "r": self.r, "p": self.p, "p_corrected": self.p_corrected})
        for name in self.gain:
            frame[f"r_{name}"], frame[f"gain_{name}"] = self.band_r[name], self.gain[name]
            if name in self.gain_p:
                frame[f"gain_{name}_p"], frame[f"gain_{name}_p_corrected"] = (
                    self.gain_p[name], self.gain_p_corrected[name],
                )  # fmt: skip
        if self.ceiling is not None:
            frame["ceiling"], frame["r_over_ceiling"] = self.ceiling, self.r / self.ceiling
        return frame


def contiguous_folds(n_volumes: int, n_folds: int, gap: int) -> list[Fold]:
    """Blocks of volumes in order, each tested once, with `gap` volumes on both sides that no one uses.

    Returns
    -------
    list of (train, test)
        Index arrays.
    """
    check_whole("n_folds", n_folds, 2)
    check_whole("gap", gap, 0)
    edges = np.linspace(0, n_volumes, int(n_folds) + 1).round().astype(int)
    folds = []
    for start, stop in pairwise(edges):
        index = np.arange(n_volumes)
        train = index[(index < start - gap) | (index >= stop + gap)]
        if stop - start < 3 or len(train) < 10:
            raise InputError(
                f"n_folds={n_folds}, gap={gap}: {n_volumes} volumes leave {len(train)} to train, {stop - start} to test"
            )
        folds.append((train, index[start:stop]))
    return folds


def encode(
    features: ArrayLike | Mapping[str, ArrayLike],
    targets: ArrayLike,
    *,
    tr: float,
    delays: Sequence[int] | None = None,
    n_folds: int = 5,
    gap: int | None = None,
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    n_iter: int = 20,
    tested: Sequence[str] | None = None,
    null: str = "circular",
    n_permutations: int | None = 99,
    min_shift: int = 10,
    correction: str = "max",
    ceiling: ArrayLike | None = None,
    names: Sequence[str] | None = None,
    random_state: int | None = 0,
) -> Encoding:
    """Predict brain series from features by ridge regression, with folds, penalties and null that respect time.

    Parameters
    ----------
    features : array ``(T, F)`` or mapping of name to array
        Without an HRF: from `align` with ``hrf=None``. A mapping makes banded ridge: each band (word rate and the other
        controls in one, networks in another) gets its own penalty (Dupré la Tour et al. 2022). Many features are as
        cheap as few: all is done on kernels ``(T, T)``.
    targets : array ``(T, R)``
        Voxels, parcels or regions, filtered as the features are.
    tr : float
        Seconds.
    delays : sequence of int, optional
        Finite impulse response, in volumes; default those within 2 to 8 s. Pass ``[0]`` for features that went through
        an HRF.
    n_folds : int
        Contiguous blocks, each predicted from the others. Penalties are chosen per target by contiguous blocks within
        the training volumes; means and SDs come from training volumes alone.
    gap : int, optional
        Volumes left out on both sides of a test block; default 16 s and at least the longest delay.
    n_iter : int
        Random mixtures of the bands that banded ridge tries (with every penalty).
    tested : sequence of str, optional
        Bands whose gain gets a p-value; default the last one. (Each costs as much as the null of `r`.)
    null : {"circular", "phase"}
        The targets are moved in time together, and all is fitted again, penalties included. (Moving only the
        predictions within their test blocks is cheaper and wrong: blocks are short, and it breaks their slow trends;
        false positives .5 for .05 at AR .9, measured.) For the gain of a band, what the other bands do not predict is
        moved (Freedman & Lane 1983).
    n_permutations : int or None
        Draws; None: all shifts, or 1000 random phases.
    ceiling : array ``(R,)``, optional
        From `noise_ceilings`, for `to_frame`.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.

    Returns
    -------
    Encoding

    Raises
    ------
    InputError
        If lengths differ, or volumes are too few for the folds; if himalaya is not installed.
    """
    tr, random_state = check_tr(tr), seed_of(random_state)
    check_option("null", null, NULLS)
    check_option("correction", correction, CORRECTIONS)
    y = check_series("targets", targets)
    n, n_targets = y.shape
    delays = None if delays is None else [check_whole("delays", delay) for delay in numbers("delays", delays)]
    alphas = [check_range("alphas", alpha, 0, open_low=True) for alpha in numbers("alphas", alphas)]
    if not alphas:
        raise InputError("alphas=[]: at least one is needed")
    check_count("n_iter", n_iter, 1)
    designs = _designs(features, n, tr, delays)
    bands = list(designs)
    for name in tested or ():
        check_option("tested", name, bands)
    gap = max(int(np.ceil(GAP_SECONDS / tr)), _longest_delay(delays, tr)) if gap is None else gap
    model = _Model(list(designs.values()), contiguous_folds(n, n_folds, gap), gap, alphas, n_iter, random_state)
    live = np.isfinite(y).all(axis=0) & (y.std(axis=0) > 0)
    if not live.any():
        raise InputError("targets: every series is constant or NaN")
    y_live = y[:, live] - y[:, live].mean(axis=0)
    parts, penalties = model.predict(y_live)
    fold_r = model.fold_r(parts.sum(axis=0), y_live)
    r = fold_r.mean(axis=0)
    without = {name: model.r(parts.sum(axis=0) - part, y_live) for name, part in zip(bands, parts)}

    warn_if_too_smooth(null, y_live)
    n_slow = missing_cosines(y_live)
    slow = slow_cosines(n, n_slow + 1)

    def moved(series: Array) -> Iterator[Array]:
        clean = series - slow @ (slow.T @ series)
        settings: dict[str, Any] = {"n_permutations": n_permutations, "min_shift": min_shift, "n_slow": n_slow}
        for draw in surrogates(clean, null, random_state=random_state, **settings):
            yield draw - slow @ (slow.T @ draw)

    null_r = np.concatenate([model.r(p.sum(axis=0), z) for p, z in model.batches(moved(y_live), y_live.shape[1])])
    null_r = null_r.reshape(-1, y_live.shape[1])
    gain = {name: r - without[name] for name in bands} if len(bands) > 1 else {}
    gain_p: dict[str, tuple[Array, Array]] = {}
    for name in (tested or bands[-1:]) if gain else ():
        i = bands.index(name)
        others = parts.sum(axis=0) - parts[i]
        draws = (others + rest for rest in moved(y_live - others))
        lost = [
            model.r(p.sum(axis=0), z) - model.r(p.sum(axis=0) - p[i], z)
            for p, z in model.batches(draws, y_live.shape[1])
        ]
        gain_p[name] = _p_values(gain[name], np.concatenate(lost).reshape(-1, y_live.shape[1]), correction)
    p = _p_values(r, null_r, correction)

    def spread(values: Array) -> Array:
        """Back to all targets, NaN for the dead."""
        full = np.full((*values.shape[:-1], n_targets), np.nan)
        full[..., live] = values
        return full

    return Encoding(
        r=spread(r), fold_r=spread(fold_r), p=spread(p[0]), p_corrected=spread(p[1]),
        band_r={name: spread(model.r(part, y_live)) for name, part in zip(bands, parts)},
        gain={name: spread(values) for name, values in gain.items()},
        gain_p={name: spread(values[0]) for name, values in gain_p.items()},
        gain_p_corrected={name: spread(values[1]) for name, values in gain_p.items()},
        null_max=null_r.max(axis=1), prediction=spread(parts.sum(axis=0)), penalties=spread(penalties),
        parts={name: spread(part) for name, part in zip(bands, parts)}, blocks=[test for _, test in model.folds],
        targets=[str(name) for name in names] if names is not None else [f"target{i}" for i in range(n_targets)],
        ceiling=None if ceiling is None else np.asarray(ceiling, dtype=np.float64),
    )  # fmt: skip


def _default_delays(tr: float) -> list[int]:
    """Volumes within 2 to 8 s."""
    delays = [d for d in range(1, int(8.0 / tr + 1e-9) + 1) if d * tr >= 2.0 - 1e-9]
    return delays or [max(1, round(4.0 / tr))]


def _longest_delay(delays: Sequence[int] | None, tr: float) -> int:
    return max(abs(int(d)) for d in (_default_delays(tr) if delays is None else delays))


def _designs(features: Any, n_volumes: int, tr: float, delays: Sequence[int] | None) -> dict[str, Array]:
    """Delayed features of each band, without dead columns."""
    bands = dict(features) if isinstance(features, Mapping) else {"features": features}
    if not bands:
        raise InputError("features: there is no band")
    designs = {}
    for name, values in bands.items():
        checked = check_series(f"features[{name!r}]", values, n_volumes)
        alive = checked.std(axis=0) > 0
        if not alive.any():
            raise InputError(f"features[{name!r}]: every column is constant or NaN")
        designs[str(name)] = add_delays(checked[:, alive], _default_delays(tr) if delays is None else delays)
    return designs


def _p_values(observed: Array, draws: Array, correction: str) -> tuple[Array, Array]:
    """Per target, and corrected over targets; one-sided."""
    single = permutation_p(observed, (draws >= observed).sum(axis=0), len(draws))
    if correction == "fdr":
        return single, benjamini_hochberg(single)
    return single, permutation_p(observed, (draws.max(axis=1)[:, None] >= observed).sum(axis=0), len(draws))


class _Model:
    """Kernels of all folds, made once; every set of targets is fitted on them."""

    def __init__(
        self, designs: list[Array], folds: list[Fold], gap: int, alphas: Sequence[float], n_iter: int, random_state: int
    ) -> None:
        self.folds, self.alphas, self.n_iter, self.random_state = folds, np.asarray(alphas), n_iter, random_state
        self.himalaya = soft_import("himalaya.kernel_ridge", "encoding", "an encoding model")
        self.inner = [_inner_folds(train, gap) for train, _ in folds]
        kernels = [[_kernels(design, train, test) for design in designs] for train, test in folds]
        self.known = [np.stack([k for k, _ in fold]) for fold in kernels]
        self.asked = [np.stack([k for _, k in fold]) for fold in kernels]

    def predict(self, y: Array) -> tuple[Array, Array]:
        """Share of each band in the held-out prediction ``(n_bands, T, R)``; penalties ``(n_folds, n_bands, R)``."""
        n_bands = len(self.known[0])
        parts, penalties = np.empty((n_bands, *y.shape)), np.empty((len(self.folds), n_bands, y.shape[1]))
        for i, (train, test) in enumerate(self.folds):
            centre, scale = y[train].mean(axis=0), y[train].std(axis=0)
            scale = np.where(scale > 0, scale, 1.0)
            predicted, penalties[i] = self._ridge(i, (y[train] - centre) / scale)
            parts[:, test] = predicted * scale
        return parts, penalties

    def _ridge(self, fold: int, y: Array) -> tuple[Array, Array]:
        known, asked, cv = self.known[fold], self.asked[fold], self.inner[fold]
        if len(known) == 1:
            model = self.himalaya.KernelRidgeCV(alphas=self.alphas, kernel="precomputed", cv=cv, warn=False)
            model.fit(known[0], y)
            return np.asarray(model.predict(asked[0]))[None], np.asarray(model.best_alphas_)[None]
        solver = {"n_iter": self.n_iter, "alphas": self.alphas, "progress_bar": False}
        model = self.himalaya.MultipleKernelRidgeCV(
            kernels="precomputed", solver="random_search", solver_params=solver, cv=cv, random_state=self.random_state
        )
        model.fit(known, y)
        return np.asarray(model.predict(asked, split=True)), np.exp(-np.asarray(model.deltas_))

    def batches(self, draws: Iterator[Array], width: int) -> Iterator[tuple[Array, Array]]:
        """Predictions for many draws of targets, several draws at once; yields ``(parts, targets)``."""
        while batch := list(islice(draws, max(1, _BATCH // width))):
            y = np.concatenate(batch, axis=1)
            yield self.predict(y)[0], y

    def fold_r(self, prediction: Array, y: Array) -> Array:
        """Correlation within each test block ``(n_folds, R)``; 0 where the prediction is constant."""
        return np.stack([_columns_r(prediction[test], y[test]) for _, test in self.folds])

    def r(self, prediction: Array, y: Array) -> Array:
        """Mean over blocks of `fold_r`."""
        return self.fold_r(prediction, y).mean(axis=0)


def _kernels(design: Array, train: NDArray[np.int64], test: NDArray[np.int64]) -> tuple[Array, Array]:
    """Linear kernels (train, train) and (test, train), scaled by the training volumes and the number of features."""
    centre, scale = design[train].mean(axis=0), design[train].std(axis=0)
    x = (design - centre) / np.where(scale > 1e-12, scale, np.inf) / np.sqrt(design.shape[1])
    return x[train] @ x[train].T, x[test] @ x[train].T


def _inner_folds(train: NDArray[np.int64], gap: int, n_folds: int = 4) -> list[Fold]:
    """Contiguous folds of the training volumes; without the gap where there is no room for it."""
    folds = []
    for part in np.array_split(np.arange(len(train)), n_folds):
        first, last = train[part[0]], train[part[-1]]
        keep = np.flatnonzero((train < first - gap) | (train > last + gap))
        folds.append((keep if len(keep) >= 10 else np.setdiff1d(np.arange(len(train)), part), part))
    return folds


def _columns_r(a: Array, b: Array) -> Array:
    """Correlation of matching columns; 0 where either is constant: nothing is explained."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    size, scale = np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=0)
    return np.divide((a * b).sum(axis=0), size * scale, out=np.zeros(len(size)), where=(size > 1e-12) & (scale > 1e-12))
