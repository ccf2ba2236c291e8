"""What is done to a run before its decomposition: drop, detrend, standardise, and treat outliers, with a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmbrain._validation import InputError, check_option, check_range
from llmbrain.decomposition._chunks import workers


@dataclass(frozen=True)
class Preprocessing:
    """Settings of `prepare`, checked when they are made.

    Parameters
    ----------
    detrend : {"none", "linear"} or int
        What is removed over tokens besides the mean: nothing, a line, or a polynomial of this degree.
    standardize : {"zscore", "center", "none"}
        Over tokens, per neuron: zero mean and unit variance (ddof 0); zero mean; nothing (then `detrend` must
        be "none").
    drop_first : int
        Tokens at the start of a run that are not fitted.
    drop_positions : int
        Tokens whose position in their context block is below this are not fitted: 1 leaves out the first token of
        every block, the BOS token or attention sink. Needs runs that know positions (scans); no effect on others.
    outliers : {"keep", "clip", "mask"}
        "clip" limits values to `outlier_threshold` standard deviations; "mask" leaves out tokens whose root mean square
        over neurons exceeds `outlier_threshold` times the median token's (the counterpart of motion scrubbing).
    outlier_threshold : float, optional
        Default: 10 for "clip", 3 for "mask".
    """

    detrend: str | int = "none"
    standardize: str = "zscore"
    drop_first: int = 0
    drop_positions: int = 1
    outliers: str = "keep"
    outlier_threshold: float | None = None

    def __post_init__(self) -> None:
        check_option("standardize", self.standardize, ("zscore", "center", "none"))
        check_option("outliers", self.outliers, ("keep", "clip", "mask"))
        if isinstance(self.detrend, str):
            check_option("detrend", self.detrend, ("none", "linear"))
        else:
            check_range("detrend", self.detrend, 0, 20)
        check_range("drop_first", self.drop_first, 0)
        check_range("drop_positions", self.drop_positions, 0)
        if self.outlier_threshold is not None:
            check_range("outlier_threshold", self.outlier_threshold, 0, open_low=True)
        if self.standardize == "none" and self.degree:
            raise InputError(f"detrend={self.detrend!r} removes the mean too: use standardize='center' or 'zscore'")

    @property
    def degree(self) -> int:
        """Degree of the polynomial that is removed; 0 is the mean."""
        return {"none": 0, "linear": 1}[self.detrend] if isinstance(self.detrend, str) else int(self.detrend)

    @property
    def threshold(self) -> float:
        """The outlier threshold in force."""
        if self.outlier_threshold is not None:
            return float(self.outlier_threshold)
        return 3.0 if self.outliers == "mask" else 10.0


class PreparedRun:
    """A run that is preprocessed block by block when it is read: no second copy of it is ever made.

    Attributes
    ----------
    keep : bool array (n_tokens,)
        Tokens that are fitted.
    live : bool Tensor (n_neurons,)
        Neurons that vary over the kept tokens; the others read as 0.
    report : dict
        Tokens dropped and masked, values clipped: see ``GroupICA.preprocessing_report_``.
    """

    def __init__(
        self,
        source: torch.Tensor,
        settings: Preprocessing,
        keep: np.ndarray,
        device: torch.device,
        dtype: torch.dtype,
        neurons: torch.Tensor | None,
    ) -> None:
        self.keep, self.device, self.dtype = keep, device, dtype
        self.n_tokens, self.n_neurons = source.shape
        self.report: dict[str, Any] = {}
        self._source = source.to(device)  # nothing to do on the CPU; one transfer on a GPU
        self._settings = settings
        self._kept = _selector(keep, device)
        self._all_kept = bool(keep.all())
        # an orthonormal polynomial basis over the kept tokens, continued over the dropped ones
        self._basis = _polynomials(keep, settings.degree).to(device, dtype) if settings.degree else None
        self.live = torch.empty(self.n_neurons, dtype=torch.bool, device=device)
        self._mean, self._scale, self._shift = (
            torch.empty(self.n_neurons, dtype=dtype, device=device) for _ in range(3)
        )
        self._trend = torch.empty((settings.degree, self.n_neurons), dtype=dtype, device=device)
        self._limit: torch.Tensor | None = None
        if settings.outliers == "clip":
            self._limit = torch.empty(self.n_neurons, dtype=dtype, device=device)
        self._measure(neurons)

    @property
    def n_kept(self) -> int:
        """Number of tokens that are fitted."""
        return int(self.keep.sum())

    @property
    def data(self) -> torch.Tensor:
        """All tokens of all neurons, (n_tokens, n_neurons): a new tensor, for small runs."""
        return self.block(slice(0, self.n_neurons))

    def block(self, columns: slice) -> torch.Tensor:
        """All tokens of some neurons, (n_tokens, n_columns), standardised with the statistics of the kept ones."""
        y = self._source[:, columns].to(self.dtype) - self._mean[columns]
        if self._basis is not None:
            y -= self._basis @ self._trend[:, columns]
        y *= self._scale[columns]
        if self._limit is not None:
            limit = self._limit[columns]
            torch.clamp(y, -limit, limit, out=y)
            y -= self._shift[columns]
        return y

    def kept_block(self, columns: slice) -> torch.Tensor:
        """The kept tokens of `block`."""
        y = self.block(columns)
        return y if self._all_kept else y[self._kept]

    def matrix(self, columns: slice) -> torch.Tensor:
        """Kept tokens of many neurons at once, (n_kept, n_columns), centred over the live ones."""
        live = self.live[columns]
        y = self.kept_block(columns)
        y -= (y.sum(dim=1, keepdim=True, dtype=torch.float64) / int(live.sum())).to(y.dtype)
        return y * live

    def _measure(self, neurons: torch.Tensor | None) -> None:
        """Statistics over the kept tokens of every neuron."""
        settings = self._settings
        # a neuron is constant when its spread is rounding error of its mean
        rounding = 16 * torch.finfo(self.dtype if self._source.dtype == torch.float64 else torch.float32).eps

        def block(columns: slice) -> torch.Tensor:
            y = self._source[:, columns].to(self.dtype)
            kept = y if self._all_kept else y[self._kept]
            mean = kept.mean(dim=0)
            kept = kept - mean
            if self._basis is not None:
                self._trend[:, columns] = trend = self._basis[self._kept].T @ kept
                kept -= self._basis[self._kept] @ trend
            spread = kept.square().mean(dim=0).sqrt_()
            alive = spread > rounding * mean.abs()
            if neurons is not None:
                alive &= neurons[columns]
            one = torch.ones((), dtype=self.dtype, device=self.device)
            scale = torch.where(alive, 1 / spread if settings.standardize == "zscore" else one, 0 * one)
            self.live[columns], self._scale[columns] = alive, scale
            self._mean[columns] = mean if settings.standardize != "none" else 0
            if self._limit is None:
                return torch.empty(0)
            limit = settings.threshold * spread * scale
            kept = (kept if settings.standardize != "none" else kept + mean) * scale
            hit = (kept.abs() > limit).sum(dim=0)
            self._limit[columns] = limit
            clipped = torch.clamp(kept, -limit, limit)  # clipping one side moves the mean
            self._shift[columns] = clipped.mean(dim=0) if settings.standardize != "none" else 0
            return hit

        with workers(self.device) as team:
            counts = torch.cat(list(team.map(block, self.n_neurons, rows=self.n_tokens))).cpu().numpy()
        if self._limit is not None:
            worst = np.argsort(-counts, kind="stable")[:10]
            self.report = {
                "n_clipped": int(counts.sum()),
                "n_neurons_clipped": int((counts > 0).sum()),
                "most_clipped": [(int(unit), int(counts[unit])) for unit in worst if counts[unit]],
            }


def _selector(keep: np.ndarray, device: torch.device) -> slice | torch.Tensor:
    """The kept tokens as an index: a slice (a view) when they follow one another, as they do unless some are masked."""
    index = np.flatnonzero(keep)
    if index[-1] - index[0] + 1 == index.size:
        return slice(int(index[0]), int(index[-1]) + 1)
    return torch.from_numpy(index).to(device)


def kept_tokens(n_tokens: int, settings: Preprocessing, positions: np.ndarray | None, name: str = "run") -> np.ndarray:
    """Which tokens of a run are fitted, before outliers are looked at; raises when fewer than two are left."""
    keep = np.ones(n_tokens, dtype=bool)
    keep[: settings.drop_first] = False
    if positions is not None and settings.drop_positions:
        keep &= positions >= settings.drop_positions
    if keep.sum() < 2 + settings.degree:
        raise InputError(
            f"{name} keeps {int(keep.sum())} of {n_tokens} tokens (drop_first={settings.drop_first}, drop_positions="
            f"{settings.drop_positions}): at least {2 + settings.degree} are needed"
        )
    return keep


def prepare(
    data: np.ndarray | torch.Tensor,
    settings: Preprocessing,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    positions: np.ndarray | None = None,
    neurons: torch.Tensor | None = None,
    name: str = "run",
) -> PreparedRun:
    """Preprocess one run; the caller's data are not touched.

    Parameters
    ----------
    data : (n_tokens, n_neurons)
        Finite numbers.
    settings : Preprocessing
    positions : int array (n_tokens,), optional
        Position of each token in its context block.
    neurons : bool Tensor (n_neurons,), optional
        Neurons to use; the others become 0 and count as constant.
    name : str
        What errors call the run.
    """
    device = torch.device(device)
    source = torch.as_tensor(data)
    keep = kept_tokens(source.shape[0], settings, positions, name)
    run = PreparedRun(source, settings, keep, device, dtype, neurons)
    report = {"n_tokens": int(keep.size), "dropped": np.flatnonzero(~keep).tolist(), "masked": []}
    if settings.outliers == "mask":
        loud = loud_tokens(run, settings.threshold)
        if loud.any():
            if (keep & ~loud).sum() < 2 + settings.degree:
                raise InputError(f"{name}: outliers='mask' at threshold {settings.threshold} leaves too few tokens")
            report["masked"] = np.flatnonzero(loud).tolist()
            run = PreparedRun(source, settings, keep & ~loud, device, dtype, neurons)
    run.report = {**report, **run.report}
    return run


def loud_tokens(run: PreparedRun, threshold: float) -> np.ndarray:
    """Kept tokens whose root mean square over neurons exceeds `threshold` times the median: bool (n_tokens,)."""
    with workers(run.device) as team:
        (power,) = team.sum(lambda part: (run.block(part).square().sum(dim=1),), run.n_neurons, rows=run.n_tokens)
    rms = power.sqrt().cpu().numpy()
    return run.keep & (rms > threshold * np.median(rms[run.keep]))


def _polynomials(keep: np.ndarray, degree: int) -> torch.Tensor:
    """Polynomials of degree 1..`degree` over all tokens, orthonormal and free of the mean over the kept ones."""
    time = np.linspace(-1, 1, keep.size)
    vander = np.polynomial.legendre.legvander(time, degree)
    _, triangle = np.linalg.qr(vander[keep])
    return torch.from_numpy(np.linalg.solve(triangle.T, vander.T).T[:, 1:].copy())
