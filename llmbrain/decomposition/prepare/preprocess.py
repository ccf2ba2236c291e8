"""What is done to a run before its decomposition: drop, detrend, standardise, and treat outliers, with a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmbrain._validation import InputError, check_option, check_range, check_whole
from llmbrain.decomposition.workers import workers

STANDARDIZE = ("zscore", "center", "none")


@dataclass(frozen=True)
class Preprocessing:
    """Settings of `prepare`, checked when they are made.

    Parameters
    ----------
    detrend : {"none", "linear"} or int
        What is removed over tokens besides the mean: nothing, a line, or a polynomial of this degree.
    standardize : {"zscore", "center", "none"} or bool
        Over tokens, per neuron: zero mean and unit variance (ddof 0); zero mean; nothing (then `detrend` must
        be "none"). True is "zscore" and False is "none", here and wherever runs are standardized.
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
    standardize: str | bool = "zscore"
    drop_first: int = 0
    drop_positions: int = 1
    outliers: str = "keep"
    outlier_threshold: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "standardize", standardize_option(self.standardize))
        check_option("outliers", self.outliers, ("keep", "clip", "mask"))
        if isinstance(self.detrend, str):
            check_option("detrend", self.detrend, ("none", "linear"))
        else:
            check_range("detrend", self.detrend, 0, 20)
        check_whole("drop_first", self.drop_first, 0)
        check_whole("drop_positions", self.drop_positions, 0)
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


def standardize_option(value: str | bool) -> str:
    """`standardize` as "zscore", "center" or "none"."""
    if isinstance(value, (bool, np.bool_)):
        return "zscore" if value else "none"
    return str(check_option("standardize", value, STANDARDIZE))


@dataclass
class Statistics:
    """What preprocessing needs to know of a run, per neuron; small beside the run.

    Attributes
    ----------
    keep : bool array (n_tokens,)
        Tokens that are fitted.
    live : bool Tensor (n_neurons,)
        Neurons that vary over the kept tokens.
    scale, offset : Tensor (n_neurons,)
        A value is multiplied by the scale (0 where a neuron is constant); then the offset, minus the scaled mean, is
        added.
    trend : Tensor (degree, n_neurons)
        Coefficients of the polynomials that are taken out then.
    limit, shift : Tensor (n_neurons,)
        Clipping, and the mean after it; empty without it.
    report : dict
        Tokens dropped and masked, values clipped: see ``GroupICA.preprocessing_report_``.
    """

    keep: np.ndarray
    live: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    trend: torch.Tensor
    limit: torch.Tensor
    shift: torch.Tensor
    report: dict[str, Any]


class PreparedRun:
    """A run that is preprocessed block by block when it is read: no second copy of it is ever made.

    Parameters
    ----------
    source : Tensor (n_tokens, n_neurons)
        On the device to compute on.
    statistics : Statistics
    dtype : torch.dtype
        Of what is read.
    """

    def __init__(self, source: torch.Tensor, statistics: Statistics, dtype: torch.dtype) -> None:
        self.n_tokens, self.n_neurons = source.shape
        self.device, self.dtype = source.device, dtype
        self.statistics = statistics
        self.keep, self.live, self.report = statistics.keep, statistics.live, statistics.report
        self._source = source
        self._kept = _selector(self.keep, self.device)
        self._all_kept = bool(self.keep.all())
        self._basis = _polynomials(self.keep, len(statistics.trend)).to(self.device, dtype)

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
        known = self.statistics
        y = torch.addcmul(known.offset[columns], self._source[:, columns].to(self.dtype), known.scale[columns])
        if known.trend.shape[0]:
            y.addmm_(self._basis, known.trend[:, columns], alpha=-1)
        if known.limit.shape[0]:
            limit = known.limit[columns]
            torch.clamp(y, -limit, limit, out=y)
            y -= known.shift[columns]
        return y

    def kept_block(self, columns: slice) -> torch.Tensor:
        """The kept tokens of `block`."""
        y = self.block(columns)
        return y if self._all_kept else y[self._kept]

    def matrix(self, columns: slice, *, center: bool = True) -> torch.Tensor:
        """Kept tokens of many neurons at once, (n_kept, n_columns), centred over the live ones (if `center`)."""
        live = self.live[columns]
        y = self.kept_block(columns)
        if center:
            y -= (y.sum(dim=1, keepdim=True, dtype=torch.float64) / int(live.sum())).to(y.dtype)
        return y * live


def measure(
    source: torch.Tensor, settings: Preprocessing, keep: np.ndarray, dtype: torch.dtype, neurons: torch.Tensor | None
) -> Statistics:
    """`Statistics` of a run over its kept tokens; `neurons` (bool) names those to use."""
    n_tokens, n_neurons = source.shape
    device = source.device
    kept, clips, centres = _selector(keep, device), settings.outliers == "clip", settings.standardize != "none"

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    known = Statistics(
        keep=keep,
        live=torch.empty(n_neurons, dtype=torch.bool, device=device),
        scale=empty(n_neurons),
        offset=empty(n_neurons),
        trend=empty(settings.degree, n_neurons),
        limit=empty(n_neurons * clips),
        shift=empty(n_neurons * clips),
        report={},
    )
    basis = _polynomials(keep, settings.degree).to(device, dtype)[kept]
    # a neuron is constant when its spread is rounding error of its mean
    rounding = 16 * torch.finfo(dtype if source.dtype == torch.float64 else torch.float32).eps

    def block(columns: slice) -> torch.Tensor:
        y = source[:, columns].to(dtype)[kept]
        mean = y.mean(dim=0)
        y = y - mean
        if settings.degree:
            trend = basis.T @ y
            y -= basis @ trend
        spread = y.square().mean(dim=0).sqrt_()
        alive = spread > rounding * mean.abs()
        if neurons is not None:
            alive &= neurons[columns]
        scale = spread.reciprocal() if settings.standardize == "zscore" else torch.ones_like(spread)
        scale[~alive] = 0
        known.live[columns], known.scale[columns] = alive, scale
        known.offset[columns] = -mean * scale if centres else 0
        if settings.degree:
            known.trend[:, columns] = trend * scale
        if not clips:
            return torch.empty(0)
        limit = settings.threshold * spread * scale
        y = (y if centres else y + mean) * scale
        known.limit[columns] = limit
        # clipping one side moves the mean
        known.shift[columns] = torch.clamp(y, -limit, limit).mean(dim=0) if centres else 0
        return (y.abs() > limit).sum(dim=0)

    with workers(device) as team:
        counts = torch.cat(list(team.map(block, n_neurons, rows=n_tokens))).cpu().numpy()
    if clips:
        worst = np.argsort(-counts, kind="stable")[:10]
        known.report = {
            "n_clipped": int(counts.sum()),
            "n_neurons_clipped": int((counts > 0).sum()),
            "most_clipped": [(int(unit), int(counts[unit])) for unit in worst if counts[unit]],
        }
    return known


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
            f"{settings.drop_positions}; n_samples={n_tokens}): at least {2 + settings.degree} are needed"
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
    statistics: Statistics | None = None,
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
    statistics : Statistics, optional
        Of an earlier reading of the same run: not measured again.
    """
    source = torch.as_tensor(data).to(device)
    if statistics is not None:
        return PreparedRun(source, statistics, dtype)
    keep = kept_tokens(source.shape[0], settings, positions, name)
    run = PreparedRun(source, measure(source, settings, keep, dtype, neurons), dtype)
    report = {"n_tokens": int(keep.size), "dropped": np.flatnonzero(~keep).tolist(), "masked": []}
    if settings.outliers == "mask":
        loud = loud_tokens(run, settings.threshold)
        if loud.any():
            if (keep & ~loud).sum() < 2 + settings.degree:
                raise InputError(f"{name}: outliers='mask' at threshold {settings.threshold} leaves too few tokens")
            report["masked"] = np.flatnonzero(loud).tolist()
            run = PreparedRun(source, measure(source, settings, keep & ~loud, dtype, neurons), dtype)
    run.report = run.statistics.report = {**report, **run.report}
    return run


def loud_tokens(run: PreparedRun, threshold: float) -> np.ndarray:
    """Kept tokens whose root mean square over neurons exceeds `threshold` times the median: bool (n_tokens,)."""
    with workers(run.device) as team:
        (power,) = team.sum(lambda part: (run.block(part).square().sum(dim=1),), run.n_neurons, rows=run.n_tokens)
    rms = power.sqrt().cpu().numpy()
    return run.keep & (rms > threshold * np.median(rms[run.keep]))


def _polynomials(keep: np.ndarray, degree: int) -> torch.Tensor:
    """Polynomials of degree 1..`degree` over all tokens, orthonormal and free of the mean over the kept ones."""
    if not degree:
        return torch.empty((keep.size, 0))
    time = np.linspace(-1, 1, keep.size)
    vander = np.polynomial.legendre.legvander(time, degree)
    _, triangle = np.linalg.qr(vander[keep])
    return torch.from_numpy(np.linalg.solve(triangle.T, vander.T).T[:, 1:].copy())
