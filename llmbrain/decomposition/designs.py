"""Designs of group tests: matrices and contrasts (FSL's files too), the statistics, and what permutation assumes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import null_space
from scipy.special import digamma

from llmbrain._files import clear_damage
from llmbrain._validation import InputError

Array = NDArray[np.float64]


class ExchangeabilityWarning(UserWarning):
    """The data do not look as a permutation test takes them to be."""


# -- FSL's files -------------------------------------------------------------------------------------------------------


def read_fsl_matrix(path: str | Path) -> Array:
    """The numbers of FSL's ``.mat``, ``.con``, ``.fts`` or ``.grp``: what follows ``/Matrix``.

    Parameters
    ----------
    path : path

    Returns
    -------
    float64 array ``(n_rows, n_columns)``
        Runs by regressors, contrasts by regressors, F tests by contrasts, runs by 1.
    """
    with clear_damage(path, "a design file of FSL"):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip().lower() == "/matrix"), None)
    if start is None:
        raise InputError(f"{path} has no line /Matrix: it is no design file of FSL")
    try:
        rows = [[float(cell) for cell in line.split()] for line in lines[start + 1 :] if line.strip()]
    except ValueError as error:
        raise InputError(f"{path} holds something that is no number after /Matrix: {error}") from None
    if not rows or len({len(row) for row in rows}) != 1:
        raise InputError(f"{path}: the rows after /Matrix differ in length, or there are none")
    with clear_damage(path, "a design file of FSL"):
        said = {w[0].lower(): int(float(w[1])) for w in map(str.split, lines[:start]) if w and w[0].startswith("/Num")}
    if said.get("/numwaves", len(rows[0])) != len(rows[0]):
        raise InputError(f"{path} says /NumWaves {said['/numwaves']}, its rows have {len(rows[0])} numbers")
    return np.array(rows)


def as_matrix(name: str, value: Any) -> Array:
    """An array, a DataFrame or the path of FSL's file as a matrix of finite numbers."""
    if isinstance(value, (str, Path)):
        matrix = read_fsl_matrix(value)
    else:
        try:
            matrix = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} must hold numbers: {error}") from None
    if not np.isfinite(matrix).all():
        raise InputError(f"{name} holds NaN or inf")
    return matrix


# -- statistics --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A design and the effect that is tested (Freedman and Lane 1983; partition as in Winkler et al. 2014).

    Attributes
    ----------
    design : array ``(n_runs, n_regressors)``
    contrast : array ``(n_rows, n_regressors)``
    effect : array ``(n_runs, rank)``
        Orthonormal; free of the nuisance; for one row its sign is that of the contrast.
    nuisance : array ``(n_runs, n_nuisance)``
        Orthonormal.
    df : int
        Residual degrees of freedom.
    """

    design: Array
    contrast: Array
    effect: Array
    nuisance: Array
    df: int

    @classmethod
    def of(cls, design: Array, contrast: ArrayLike) -> Model:
        """Partition a design by a contrast: one row gives a t test, more an F test."""
        design = design[:, None] if design.ndim == 1 else design
        rows = np.atleast_2d(as_matrix("contrast", contrast))
        n, p = design.shape
        if rows.shape[1] != p:
            raise InputError(f"contrast has {rows.shape[1]} columns, the design has {p} regressors")
        if np.linalg.matrix_rank(design) < p:
            raise InputError(f"design has rank {np.linalg.matrix_rank(design)} for {p} regressors: leave some out")
        if np.linalg.matrix_rank(rows) < len(rows):
            raise InputError("contrast has rows that depend on each other, or are 0")
        df = n - p
        if df < 1:
            raise InputError(f"design leaves no degrees of freedom: {n} runs (or subjects) for {p} regressors")
        rest = design @ null_space(rows)
        nuisance = np.linalg.qr(rest)[0] if rest.size else np.zeros((n, 0))
        own = design @ np.linalg.pinv(rows)
        own = own - nuisance @ (nuisance.T @ own)
        effect, triangle = np.linalg.qr(own)
        if len(rows) == 1:
            effect = effect * np.sign(triangle[0, 0])
        return cls(design, rows, effect, nuisance, df)

    @property
    def is_f(self) -> bool:
        """Whether this is an F test."""
        return len(self.contrast) > 1

    def residuals(self, y: Array) -> Array:
        """`y` ``(n_runs, n)`` without the nuisance: what is exchanged."""
        return y - self.nuisance @ (self.nuisance.T @ y)

    def statistics(self, y: Array, orders: NDArray[np.int64], signs: Array) -> Array:
        """t or F of each arrangement of `y` that is free of the nuisance; ``(n_arrangements, n_neurons)``."""
        total = (y**2).sum(axis=0)

        def explained(basis: Array) -> Array:
            return np.stack([(basis[orders, k] * signs) @ y for k in range(basis.shape[1])])

        found = explained(self.effect)
        by_effect = (found**2).sum(axis=0)
        rest = total - by_effect
        if self.nuisance.shape[1]:
            rest = rest - (explained(self.nuisance) ** 2).sum(axis=0)
        variance = np.maximum(rest, 0) / self.df
        if self.is_f:
            return ratio(by_effect / len(self.contrast), variance)
        return ratio(found[0], np.sqrt(variance))

    def pivotal(self, y: Array, orders: NDArray[np.int64], signs: Array, groups: NDArray[np.int64]) -> Array:
        """As `statistics`, with a variance of its own for each group of runs.

        Aspin-Welch's v for one row, Winkler's G (2014, NeuroImage 92, eq. 5 and 6) for more; for two groups v is the t
        of Welch.
        """
        if not self.is_f and (orders == orders[0]).all() and self._is_means_of(groups):
            return self._welch(y, signs, groups)
        inverse = np.linalg.pinv(self.design)
        hat = np.eye(len(self.design)) - self.design @ inverse
        parts = [groups == g for g in np.unique(groups)]
        free = [hat.diagonal()[part].sum() for part in parts]
        crossed = np.array([self.design[part].T @ self.design[part] for part in parts])
        out = np.empty((len(orders), y.shape[1]))
        for i, (order, sign) in enumerate(zip(orders, signs)):
            moved = np.empty_like(y)
            moved[order] = sign[:, None] * y
            left = hat @ moved
            spread = np.array([(left[part] ** 2).sum(axis=0) for part in parts])
            floor = 1e-24 * (moved**2).sum(axis=0)
            weight = np.array(free)[:, None] / np.maximum(spread, np.maximum(floor, np.finfo(float).tiny))
            inner = np.linalg.inv(np.einsum("gv,gij->vij", weight, crossed))
            middle = self.contrast @ inner @ self.contrast.T  # (neurons, rows, rows)
            size = (self.contrast @ (inverse @ moved)).T  # (neurons, rows)
            if self.is_f:
                out[i] = (size * np.linalg.solve(middle, size[..., None])[..., 0]).sum(axis=1) / len(self.contrast)
            else:
                out[i] = ratio(size[:, 0], np.sqrt(middle[:, 0, 0]))
        return out

    def _is_means_of(self, groups: NDArray[np.int64]) -> bool:
        """Whether each regressor is 1 in one of the groups and 0 elsewhere."""
        own = (groups[:, None] == np.arange(groups.max() + 1)).astype(np.float64)
        return self.design.shape == own.shape and bool((self.design == own).all())

    def _welch(self, y: Array, signs: Array, groups: NDArray[np.int64]) -> Array:
        """`pivotal` for means of groups and flipped signs, all arrangements at once."""
        size, variance = np.zeros((len(signs), y.shape[1])), np.zeros((len(signs), y.shape[1]))
        for g, weight in enumerate(self.contrast[0]):
            runs = groups == g
            mean = signs[:, runs] @ y[runs] / runs.sum()
            spread = np.maximum((y[runs] ** 2).sum(axis=0) - runs.sum() * mean**2, 0) / (runs.sum() - 1)
            size += weight * mean
            variance += weight**2 * spread / runs.sum()
        return ratio(size, np.sqrt(variance))


def ratio(size: Array, error: Array) -> Array:
    """size / error; 0 where a neuron is 0 in all runs; error is floored where all runs agree to the last digit."""
    floor = np.abs(size) * 1e-12
    return np.divide(size, np.maximum(error, floor), out=np.zeros_like(size), where=size != 0)


# -- what permutation assumes ------------------------------------------------------------------------------------------


def check_assumptions(
    data: NDArray[Any], model: Model, *, flips: bool, blocked: bool, groups: NDArray[np.int64] | None
) -> None:
    """Warn where runs look alike (one subject's, say), where flipped signs meet skew, and where variances differ.

    Parameters
    ----------
    data : array ``(n_runs, n_networks, n_neurons)``
    model : Model
    flips : bool
        Signs are flipped, which takes errors to be symmetric; else runs are permuted, which takes them to be alike.
    blocked : bool
        Blocks or subjects were given.
    groups : int array ``(n_runs,)``, optional
        Groups whose variances the statistic takes to be the same.
    """
    n = len(data)
    flat = data.reshape(n, -1)
    if flat.shape[1] > 20_000:
        flat = flat[:, np.linspace(0, flat.shape[1] - 1, 20_000).astype(int)]
    y = flat.astype(np.float64)
    y = y - model.design @ (np.linalg.pinv(model.design) @ y)
    scale = np.sqrt((y**2).mean(axis=0))
    y = y[:, scale > 1e-12 * max(float(np.abs(flat).max(initial=0)), 1e-300)]
    if n < 6 or y.shape[1] < 20:
        return
    y = y / np.sqrt((y**2).mean(axis=0))
    effective = _effective_number(y, model.df)
    if not blocked and n >= 8:
        _check_alike(y, n)
    if flips:
        _check_symmetry(y, n, effective)
    elif groups is not None:
        _check_variances(y, groups, effective)


def _effective_number(y: Array, df: int) -> float:
    """How many independent neurons have eigenvalues over runs as uneven as these."""
    values = np.linalg.eigvalsh(y @ y.T)
    concentration = float((values**2).sum() / values.sum() ** 2)
    return float(np.clip(1 / max(concentration - 1 / df, 1 / y.shape[1]), 1, y.shape[1]))


def _check_alike(y: Array, n: int) -> None:
    r = np.asarray(np.corrcoef(y))[np.triu_indices(n, 1)]
    centre = float(np.median(r))
    spread = 1.4826 * float(np.median(np.abs(r - centre)))
    largest = float(r.max())
    # many subjects: few pairs stand out of the others; few subjects: pairs are of two kinds
    two_kinds = r.std() > 0.15 and float(((r - r.mean()) ** 4).mean() / r.var() ** 2) < 1.9
    if largest - centre > max(5 * spread, 0.1) or (two_kinds and largest > 0.3):
        warnings.warn(
            f"some runs resemble each other far more than others do (r of what the design leaves up to {largest:.2f}): "
            "runs of one subject are not exchangeable with those of another. Pass subjects= (one label a run; runs of "
            "a subject are averaged) or blocks=",
            ExchangeabilityWarning,
            stacklevel=4,
        )


def _check_symmetry(y: Array, n: int, effective: float) -> None:
    """Share of runs above the mean: 1/2 for symmetric errors, with a variance of .09/n (normal) to .25/n (Laplace)."""
    lean = (y > 0).mean(axis=0) - 0.5
    together = abs(float(lean.mean())) > max(0.04, 3 * np.sqrt(0.25 / n / effective))
    each = effective >= 10 and float((lean**2).mean()) > 1.4 * 0.25 / n
    if together or each:
        warnings.warn(
            f"maps are skewed over runs (on average {100 * (0.5 + float(lean.mean())):.0f}% of runs are above the "
            "mean): sign flips take errors to be symmetric, and give too many false positives where they are not. "
            "Transform the maps, or compare two groups",
            ExchangeabilityWarning,
            stacklevel=4,
        )


def _check_variances(y: Array, groups: NDArray[np.int64], effective: float) -> None:
    kinds, sizes = np.unique(groups, return_counts=True)
    if len(kinds) < 2 or sizes.min() < 3:
        return
    log, error = [], []
    for kind, size in zip(kinds, sizes):
        half = (size - 1) / 2
        spread = np.maximum(y[groups == kind].var(axis=0, ddof=1), 1e-12)
        log.append(float(np.log(spread).mean()) - (digamma(half) - np.log(half)))
        error.append(1 / half)
    low, high = int(np.argmin(log)), int(np.argmax(log))
    gap = log[high] - log[low]
    if gap > max(np.log(1.5), 3 * np.sqrt((error[low] + error[high]) / effective)):
        warnings.warn(
            f"groups differ in variance ({np.exp(gap / 2):.2f} to 1 in SD; {sizes[high]} and {sizes[low]} runs): "
            "labels of such groups are not exchangeable, and the largest t of all neurons is larger by chance than the "
            "test allows for. Use statistic='welch', which gives each group its variance and flips signs",
            ExchangeabilityWarning,
            stacklevel=4,
        )
