"""Where a network ends: cut-offs of z maps, by five methods that can stand side by side."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import ConvergenceWarning

from llmbrain._progress import bar
from llmbrain._validation import InputError, check_count, check_option, check_range, seed_of
from llmbrain.stats import PUBLISHED_Z
from llmbrain.stats.nulls import independent_times, phase_randomize
from llmbrain.stats.sparsity import zscore_maps
from llmbrain.stats.tails import benjamini_hochberg

METHODS = ("fixed", "auto", "mixture", "fdr", "fwe")
MOST_KURTOSIS = 6.0  # excess, of the median neuron; that of a Laplace distribution is 3
Array = NDArray[np.float64]
_LEAST_SD = 0.9  # of the robust SD of a map: the bulk is not smaller


def cutoffs_for(
    maps: ArrayLike,
    method: str = "fixed",
    *,
    threshold: float = PUBLISHED_Z,
    ratio: float = 1.0,
    probability: float = 0.5,
    alpha: float = 0.05,
    null: NullNetworks | None = None,
) -> NDArray[np.float32]:
    """(low, high) of each z map, ``(n_maps, 2)``: a neuron is in if ``z < low or z > high``; infinite if none can be.

    Parameters are those of `FunctionalNetworks.rethreshold`.

    References
    ----------
    "auto": Varoquaux et al. 2010 (CanICA), as nilearn has it. "mixture": Beckmann and Smith 2004 (MELODIC).
    """
    check_option("method", method, METHODS)
    z = np.atleast_2d(np.asarray(maps, dtype=np.float64))
    if method == "fixed":
        high = np.full(len(z), check_range("threshold", threshold, 0))
    elif method == "auto":
        check_range("ratio", ratio, 0, open_low=True)
        keep = ratio / len(z)
        cut = np.quantile(np.abs(z), 1 - keep) if keep < 1 else 0.0
        high = np.full(len(z), np.nextafter(np.float32(cut), np.float32(-1)))  # the neuron at the cut is kept, as there
        high = np.maximum(high, 0)
    elif method == "mixture":
        check_range("probability", probability, 0, 1, open_low=True, open_high=True)
        return np.array([_mixture_cutoffs(row, probability, k) for k, row in enumerate(z)], dtype=np.float32)
    else:
        check_range("alpha", alpha, 0, 1, open_low=True, open_high=True)
        if null is None:
            raise InputError(f"method={method!r} needs null=: llmbrain.networks.null_networks(scans, n_components)")
        high = np.array([null.fdr_cutoff(row, alpha) if method == "fdr" else null.fwe_cutoff(alpha) for row in z])
    return np.stack([-high, high], axis=1).astype(np.float32)


# -- Gaussian/gamma mixture --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """A Gaussian bulk with a gamma tail on either side.

    Attributes
    ----------
    weights : (bulk, positive, negative), summing to 1
    mean, sd : of the bulk
    shapes, scales : of the gammas of ``z`` and ``-z``
    log_likelihood : of the data it was fitted to, natural log
    n_iter : steps of EM
    converged : bool
    origin : where the gammas start: the median of the map, since a network of one sign moves the mean of a z map
    """

    weights: Array
    mean: float
    sd: float
    shapes: Array
    scales: Array
    log_likelihood: float
    n_iter: int
    converged: bool = True
    origin: float = 0.0

    def posterior(self, z: ArrayLike) -> Array:
        """Probability of (bulk, positive, negative) for every value; ``(3, n)``."""
        joint = self._joint(np.asarray(z, dtype=np.float64))
        return np.exp(joint - np.logaddexp.reduce(joint, axis=0))

    def _joint(self, z: Array) -> Array:
        from scipy.stats import gamma, norm

        with np.errstate(divide="ignore"):
            log = np.log(self.weights)
            tails = [
                gamma.logpdf(s * (z - self.origin), self.shapes[i], scale=self.scales[i]) for i, s in enumerate((1, -1))
            ]
            return log[:, None] + np.stack([norm.logpdf(z, self.mean, self.sd), *tails])

    def cutoffs(self, z: ArrayLike, probability: float = 0.5) -> tuple[float, float]:
        """(low, high) such that beyond them every value of `z` has a posterior above `probability`."""
        z = np.asarray(z, dtype=np.float64)
        posterior = self.posterior(z)
        found = []
        for side, p in ((1, posterior[1]), (-1, posterior[2])):
            unsure = side * z[(p <= probability) & (side * (z - self.origin) > 0)]
            edge = unsure.max(initial=side * self.origin)
            sure = side * z[(p > probability) & (side * z > edge)]
            found.append(float(edge) if len(sure) else np.inf)
        return -found[1], found[0]


def _mixture_cutoffs(z: Array, probability: float, index: int) -> tuple[float, float]:
    """Cut-offs of one map, or a refusal where the mixture has no bulk to cut from."""
    fit = fit_mixture(z)
    if fit.weights[0] < 0.5:
        raise InputError(
            f"method='mixture': the Gaussian bulk of map {index} holds {100 * fit.weights[0]:.0f}% of its neurons, "
            "below one half: such a map has no background for a network to stand out from. Use method='fixed', 'fdr' "
            "or 'fwe'"
        )
    if not fit.converged:
        warnings.warn(
            f"method='mixture': map {index} did not converge in {fit.n_iter} steps: its cut-offs are not the best ones",
            ConvergenceWarning,
            stacklevel=4,
        )
    return fit.cutoffs(z, probability)


def fit_mixture(z: ArrayLike, *, max_iter: int = 2000, tol: float = 1e-7) -> Mixture:
    """Fit a Gaussian and two gammas to the values of one map, by expectation-maximisation.

    The gammas are fitted by moments, and the mode of each stays at least one bulk SD from zero: a gamma that explains
    the middle of the bulk would make everything a network (Beckmann and Smith 2004; Woolrich et al. 2005). For the same
    reason the SD of the bulk stays above a share of the robust SD of the whole map (from the median absolute
    deviation): on a map that is peaked like a Laplace distribution the bulk would else shrink into the peak.

    Parameters
    ----------
    z : array ``(n_neurons,)``
    max_iter, tol : int, float
        Steps, and the relative change of the mean log likelihood at which to stop.
    """
    x = np.asarray(z, dtype=np.float64).ravel()
    spread = 1.4826 * np.median(np.abs(x - np.median(x)))
    sd = float(spread if spread > 0 else x.std())
    if sd == 0:
        return Mixture(np.array([1.0, 0, 0]), float(x[0]), 1.0, np.full(2, 4.0), np.ones(2), 0.0, 0)
    origin = float(np.median(x))
    least = _LEAST_SD * sd if spread > 0 else 1e-6
    state = Mixture(
        np.array([0.9, 0.05, 0.05]), origin, sd, np.full(2, 9.0), np.full(2, sd / 2.5), -np.inf, 0, origin=origin
    )
    for step in range(1, max_iter + 1):
        joint = state._joint(x)
        total = np.logaddexp.reduce(joint, axis=0)
        share = np.exp(joint - total)
        likelihood = float(total.sum())
        done = abs(likelihood - state.log_likelihood) < tol * len(x)
        mass = share.sum(axis=1)
        mean = float(share[0] @ x / mass[0])
        sd = max(float(np.sqrt(share[0] @ (x - mean) ** 2 / mass[0])), least)
        gammas = [_gamma_moments(side * (x - origin), w, sd) for side, w in ((1, share[1]), (-1, share[2]))]
        shapes, scales = np.array(gammas).T
        state = Mixture(mass / mass.sum(), mean, sd, shapes, scales, likelihood, step, done, origin)
        if done:
            break
    return state


def _gamma_moments(x: Array, weight: Array, bulk: float) -> tuple[float, float]:
    """(shape, scale) with the weighted mean and variance of `x`, the mode at least `bulk` from zero."""
    mass = weight.sum()
    if mass < 1e-8:
        return 9.0, bulk / 2.5
    mean = float(weight @ x / mass)
    variance = max(float(weight @ (x - mean) ** 2 / mass), 1e-6 * bulk**2)
    mean = max(mean, 1.5 * bulk)
    scale = min(variance / mean, mean - bulk)  # the mode is mean - scale
    return mean / scale, scale


# -- networks of nothing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NullNetworks:
    """What ``|z|`` looks like in networks of scans whose neurons have nothing to do with each other.

    Attributes
    ----------
    maxima : array ``(n_permutations,)``
        Largest ``|z|`` of all maps of each draw.
    counts : array ``(n_bins,)``
        Number of ``|z|`` in bins of width `STEP` from 0, all maps and draws together.
    """

    maxima: Array
    counts: Array

    STEP = 0.005

    @classmethod
    def from_maps(cls, draws: Sequence[ArrayLike]) -> NullNetworks:
        """From the z maps of each draw, ``(n_maps, n_neurons)``."""
        absolute = [np.abs(np.asarray(maps, dtype=np.float64)) for maps in draws]
        bins = 1 + int(max(a.max() for a in absolute) / cls.STEP)
        counts = np.sum(
            [np.bincount((a.ravel() / cls.STEP).astype(np.int64), minlength=bins) for a in absolute], axis=0
        )
        return cls(np.array([a.max() for a in absolute]), counts.astype(np.float64))

    def p_values(self, z: ArrayLike) -> Array:
        """Share of null values at least as large as ``|z|``, counting the value itself: ``(b + 1) / (n + 1)``."""
        at_least = np.append(np.cumsum(self.counts[::-1])[::-1], 0)
        bins = np.minimum((np.abs(np.asarray(z, dtype=np.float64)) / self.STEP).astype(np.int64), len(self.counts))
        return (at_least[bins] + 1) / (self.counts.sum() + 1)

    def fdr_cutoff(self, z: Array, alpha: float) -> float:
        """``|z|`` just below the weakest neuron that Benjamini and Hochberg's rule keeps in one map; inf if none."""
        kept = np.abs(z)[benjamini_hochberg(self.p_values(z)) <= alpha]
        return float(np.nextafter(np.float32(kept.min()), np.float32(-1))) if len(kept) else np.inf

    def fwe_cutoff(self, alpha: float) -> float:
        """``|z|`` that the largest of all null maps exceeds in a share `alpha` of draws, ``(b + 1) / (n + 1)``."""
        allowed = int(np.floor(alpha * (len(self.maxima) + 1) + 1e-9))
        if allowed < 1:
            needed = int(np.ceil(1 / alpha)) - 1
            raise InputError(f"alpha={alpha} needs at least {needed} null draws, null has {len(self.maxima)}")
        return float(np.sort(self.maxima)[-allowed])


LEAST_TOKENS = 40  # independent ones, below which cut-offs against phase-randomized networks are too high


class HeavyTailsWarning(UserWarning):
    """Activations are far from normal, and the null's are not."""


def _some_columns(data: NDArray[Any]) -> NDArray[np.float64]:
    """At most 2,000 of a run's neurons, evenly spread."""
    return data[:, np.linspace(0, data.shape[1] - 1, min(data.shape[1], 2000)).astype(int)].astype(np.float64)


def _warn_of_tails(data: NDArray[Any]) -> None:
    chosen = _some_columns(data)
    centered = chosen - chosen.mean(axis=0)
    variance = np.maximum((centered**2).mean(axis=0), 1e-300)
    excess = float(np.median((centered**4).mean(axis=0) / variance**2)) - 3
    if excess > MOST_KURTOSIS:
        warnings.warn(
            f"time courses are heavy-tailed (median excess kurtosis {excess:.1f}): random phases make them normal, so "
            "that single tokens of extreme activity pass for networks of the scans and not of the null. Cut-offs "
            "against it are too low here: clip them (outliers='clip'), or read 'fdr' and 'fwe' as scales",
            HeavyTailsWarning, stacklevel=3,
        )  # fmt: skip


def _warn_of_memory(runs: Iterable[NDArray[Any]]) -> None:
    worth = 0.0
    for run in runs:
        worth += independent_times(_some_columns(run))
        if worth >= LEAST_TOKENS:
            return
    warnings.warn(
        f"the tokens of all runs are worth about {worth:.0f} independent ones: with fewer than {LEAST_TOKENS}, "
        "cut-offs against this null are too high, and networks keep fewer neurons than they could, or none",
        UserWarning, stacklevel=3,
    )  # fmt: skip


def null_networks(
    scans: Any,
    n_components: int = 20,
    *,
    n_permutations: int = 20,
    random_state: int | None = 0,
    progress: bool = True,
    **options: Any,
) -> NullNetworks:
    """Group ICA of phase-randomised scans, repeated: what networks of unrelated neurons look like.

    Parameters
    ----------
    scans : what `GroupICA.fit` takes
    n_components : int
        As many as the networks that the null is for.
    n_permutations : int
        FWE at .05 needs 19. The null takes neighbouring neurons to be strangers: images of a brain are refused, arrays
        that look like one get a warning (see `split_half_reproducibility`). Random phases make time courses normal:
        there is a warning where those of the scans are far from it, and where their tokens are worth few independent
        ones.
    options
        Go to `GroupICA`; use those of the real decomposition.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.
    progress : bool
        Show a bar.
    """
    from llmbrain.decomposition import GroupICA
    from llmbrain.decomposition.reproducibility import check_neighbors
    from llmbrain.imaging.brain_mask import split_mask
    from llmbrain.scanning.inputs import Runs

    check_count("n_permutations", n_permutations, 1)
    random_state = seed_of(random_state)
    _, image = split_mask(options.get("mask"))
    runs = Runs(scans, mask_img=image)
    check_neighbors(runs)
    _warn_of_tails(runs[0])
    _warn_of_memory(runs)
    draws = []
    for draw in bar(range(n_permutations), desc="null networks", show=progress):
        rng = np.random.default_rng([random_state, draw])
        ica = GroupICA(n_components, random_state=random_state + draw, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # noise has no components to converge on
            # One set of phases for all neurons would turn the tokens by an orthogonal matrix, which spatial ICA cannot
            # see; and each run keeps its own type.
            ica.fit([phase_randomize(run, rng, shared=False) for run in runs])
        draws.append(zscore_maps(ica.components_, skip_zeros=True))
    return NullNetworks.from_maps(draws)
