"""What is done to a run before its decomposition: drop, detrend, standardise, and treat outliers, with a report."""

from __future__ import annotations

from dataclasses import dataclass, field
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
        Over tokens, per neuron: zero mean and unit variance (ddof 0); zero mean; nothing (then `detrend` must be "none").
    drop_first : int
        Tokens at the start of a run that are not fitted.
    drop_positions : int
        Tokens whose position in their context block is below this are not fitted: 1 leaves out the first token of every
        block, which is the BOS token or the attention sink. Needs runs that know positions (scans); no effect on others.
    outliers : {"keep", "clip", "mask"}
        "clip" limits |z| to `outlier_threshold`; "mask" leaves out tokens whose root mean square over neurons exceeds
        `outlier_threshold` times the median token's (the counterpart of motion scrubbing).
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


@dataclass
class PreparedRun:
    """A run ready for decomposition.

    Attributes
    ----------
    data : Tensor (n_tokens, n_neurons)
        All tokens, standardised with the statistics of the kept ones; constant neurons are 0.
    keep : bool array (n_tokens,)
        Tokens that are fitted.
    live : bool Tensor (n_neurons,)
        Neurons that vary over the kept tokens.
    report : dict
        Tokens dropped and values clipped: see `GroupICA.preprocessing_report_`.
    """

    data: torch.Tensor
    keep: np.ndarray
    live: torch.Tensor
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> torch.Tensor:
        """The kept tokens: a view when they follow one another, as they do unless some were masked."""
        return self.data[_selector(self.keep, self.data.device)]


def _selector(keep: np.ndarray, device: torch.device) -> slice | torch.Tensor:
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
    """
    device = torch.device(device)
    source = torch.as_tensor(data)
    keep = kept_tokens(source.shape[0], settings, positions, name)
    prepared = _standardise(source, settings, keep, device, dtype, neurons)
    report: dict[str, Any] = {"n_tokens": int(keep.size), "dropped": np.flatnonzero(~keep).tolist(), "masked": []}
    if settings.outliers == "mask":
        loud = loud_tokens(prepared, settings.threshold)
        if loud.any():
            if (keep & ~loud).sum() < 2 + settings.degree:
                raise InputError(f"{name}: outliers='mask' at threshold {settings.threshold} leaves too few tokens")
            report["masked"] = np.flatnonzero(loud).tolist()
            prepared = _standardise(source, settings, keep & ~loud, device, dtype, neurons)
    prepared.report = report | prepared.report
    return prepared


def loud_tokens(run: PreparedRun, threshold: float) -> np.ndarray:
    """Kept tokens whose root mean square over neurons exceeds `threshold` times the median: bool (n_tokens,)."""
    rms = torch.linalg.vector_norm(run.data, dim=1).cpu().numpy()
    return run.keep & (rms > threshold * np.median(rms[run.keep]))


def _standardise(
    source: torch.Tensor,
    settings: Preprocessing,
    keep: np.ndarray,
    device: torch.device,
    dtype: torch.dtype,
    neurons: torch.Tensor | None,
) -> PreparedRun:
    n_tokens, n_neurons = source.shape
    chosen = _selector(keep, device)
    whole = bool(keep.all())
    out = torch.empty((n_tokens, n_neurons), dtype=dtype, device=device)
    live = torch.empty(n_neurons, dtype=torch.bool, device=device)
    n_kept = int(keep.sum())
    # an orthonormal polynomial basis over the kept tokens, continued over the dropped ones
    basis = _polynomials(keep, settings.degree).to(device, dtype) if settings.degree else None
    # a neuron is constant when its spread is rounding error of its mean
    rounding = 16 * torch.finfo(dtype if source.dtype == torch.float64 else torch.float32).eps
    clip = settings.threshold if settings.outliers == "clip" else None

    def block(columns: slice) -> tuple[int, torch.Tensor | None]:
        y = out[:, columns]
        y.copy_(source[:, columns])
        fitted = y if whole else y[chosen]
        mean = fitted.mean(dim=0)
        if settings.standardize != "none":
            y -= mean
            if basis is not None:
                y -= basis @ (basis[chosen].T @ y[chosen])
            fitted = y if whole else y[chosen]
        centred = fitted if settings.standardize != "none" else fitted - mean
        spread = centred.square().mean(dim=0).sqrt_()
        alive = spread > rounding * mean.abs()
        if neurons is not None:
            alive &= neurons[columns]
        live[columns] = alive
        if settings.standardize == "zscore":
            y *= torch.where(alive, 1 / spread, 0.0)
        elif not bool(alive.all()):
            y *= alive
        if clip is None:
            return 0, None
        limit = clip if settings.standardize == "zscore" else clip * spread
        hit = y.abs() > limit
        hit[torch.from_numpy(~keep).to(device)] = False
        count = hit.sum(dim=0)
        if bool(count.any()):
            y.clamp_(-limit, limit) if isinstance(limit, float) else torch.clamp(y, -limit, limit, out=y)
            if settings.standardize != "none":
                y -= (y if whole else y[chosen]).mean(dim=0) * alive  # clipping one side moves the mean
        return int(count.sum()), count

    with workers(device) as team:
        results = list(team.map(block, n_neurons, rows=n_tokens))
    run = PreparedRun(out, keep, live, {"n_kept": n_kept})
    if clip is not None:
        counts = torch.cat([count for _, count in results if count is not None]).cpu().numpy()
        worst = np.argsort(counts, kind="stable")[::-1][:10]
        run.report |= {
            "n_clipped": int(counts.sum()),
            "n_neurons_clipped": int((counts > 0).sum()),
            "most_clipped": [(int(unit), int(counts[unit])) for unit in worst if counts[unit]],
        }
    return run


def _polynomials(keep: np.ndarray, degree: int) -> torch.Tensor:
    """Polynomials of degree 1..`degree` over all tokens, orthonormal and free of the mean over the kept ones."""
    time = np.linspace(-1, 1, keep.size)
    vander = np.polynomial.legendre.legvander(time, degree)
    _, triangle = np.linalg.qr(vander[keep])
    return torch.from_numpy(np.linalg.solve(triangle.T, vander.T).T[:, 1:].copy())


def center_over_neurons(run: PreparedRun) -> PreparedRun:
    """Take from every token its mean over the live neurons, in place: spatial ICA's samples are the neurons."""
    data, live = run.data, run.live
    weight = live.to(data.dtype)
    n_live = max(int(live.sum()), 1)
    with workers(data.device) as team:
        sums = team.map(
            lambda columns: (data[:, columns] @ weight[columns]).double(), data.shape[1], rows=data.shape[0]
        )
        mean = (sum(sums) / n_live).to(data.dtype)[:, None]  # constant neurons are 0 and stay 0

        def subtract(columns: slice) -> None:
            if bool(live[columns].all()):
                data[:, columns] -= mean
            else:
                data[:, columns] -= mean * weight[columns]

        for _ in team.map(subtract, data.shape[1], rows=data.shape[0]):
            pass
    return run
