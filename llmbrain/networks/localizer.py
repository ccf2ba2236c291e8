"""The functional localizer: a GLM a neuron (or a network) over the conditions of the text, as it is run on people.

A token is a TR and a neuron answers at once, so a condition is a boxcar over its tokens: there is no haemodynamics. The
noise is not white, though, and a neuron's series is not normal: significance comes from shifting the conditions in a
circle against each run, with the largest ``|t|`` of all units, and only the t itself is parametric.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmbrain._validation import InputError, check_count, check_option, check_range, check_whole, seed_of
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.networks.functional import FunctionalNetworks
from llmbrain.scanning.scans import Scan
from llmbrain.stats.matching import correlate_rows
from llmbrain.stats.nulls import circular_shift
from llmbrain.stats.tails import t_to_z

if TYPE_CHECKING:
    import pandas as pd

    from llmbrain.imaging.brain_mask import BrainMask
    from llmbrain.imaging.surface import Grayordinates

NOISE = ("ols", "ar1")
PERMUTE = ("shift", "labels")
Array = NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class Localizer:
    """What `localizer` returns; every array is ``(n_contrasts, n_units)``, units being neurons or networks.

    Attributes
    ----------
    contrasts : list of str
    effect : mean over runs, in units of the data
    t : fixed effects over runs
    z : t as a standard normal deviate (parametric: for maps, not for decisions)
    p_fwe : corrected over all units of a contrast, by permutation; nan without permutations
    null : largest ``|t|`` of each permutation, ``(n_contrasts, n_permutations)``
    space : NeuronSpace or None
    names : of the networks; None for neurons
    brain : BrainMask or Grayordinates, where voxels of a brain were tested
    """

    contrasts: list[str]
    effect: Array
    t: Array
    z: Array
    p_fwe: Array
    null: Array
    space: NeuronSpace | None = None
    names: list[str] | None = None
    brain: BrainMask | Grayordinates | None = None

    def __repr__(self) -> str:
        tested = "networks" if self.names is not None else "neurons" if self.brain is None else "places of a brain"
        found = ", ".join(f"{name}: {int((p <= 0.05).sum())}" for name, p in zip(self.contrasts, self.p_fwe))
        return f"Localizer({self.t.shape[1]} {tested}; p_fwe <= .05 in {found})"

    def threshold(self, alpha: float = 0.05) -> Array:
        """``|t|`` above which a unit is significant at `alpha`, FWE; inf with too few permutations for it."""
        n = self.null.shape[1]
        allowed = int(np.floor(alpha * (n + 1) + 1e-9))
        if allowed < 1:
            return np.full(len(self.null), np.inf)
        return np.sort(self.null, axis=1)[:, -allowed]

    def to_frame(self, alpha: float | None = None) -> pd.DataFrame:
        """Long table: contrast, where, effect, t, z, p_fwe; `alpha`: only what is significant.

        Where is layer and neuron, a network, a voxel with its place in millimeters, or a grayordinate.
        """
        import pandas as pd

        n_units = self.t.shape[1]
        frame = pd.DataFrame({"contrast": np.repeat(self.contrasts, n_units)})
        if self.names is not None:
            frame["network"] = self.names * len(self.contrasts)
        elif self.space is not None:
            layer, neuron = self.space.locate(np.arange(n_units))
            frame["layer"], frame["neuron"] = np.tile(layer, len(self.t)), np.tile(neuron, len(self.t))
        else:
            millimeters = getattr(self.brain, "millimeters", None)  # of voxels
            unit = "neuron" if self.brain is None else "voxel" if millimeters else "grayordinate"
            frame[unit] = np.tile(np.arange(n_units), len(self.t))
            if millimeters:
                for axis, place in zip("xyz", millimeters().T.round(2)):
                    frame[f"{axis}_mm"] = np.tile(place, len(self.t))
        for name in ("effect", "t", "z", "p_fwe"):
            frame[name] = getattr(self, name).ravel()
        return frame if alpha is None else frame[frame["p_fwe"] <= alpha].reset_index(drop=True)

    def to_networks(self, alpha: float = 0.05, *, poles: str = "positive") -> FunctionalNetworks:
        """The t maps as networks: the neurons that are significant for each contrast (a localizer's region)."""
        if self.names is not None:
            raise InputError("to_networks needs a localizer over neurons, this one is over networks")
        high = self.threshold(alpha)
        return FunctionalNetworks(
            self.t,
            self.space,
            threshold=np.stack([-high, high], axis=1),
            poles=poles,
            names=self.contrasts,
            standardize=False,
            provenance={"estimator": "localizer", "alpha": alpha, "permutations": int(self.null.shape[1])},
            brain=self.brain,
        )


def localizer(
    scans: Scan | Sequence[Scan],
    contrasts: Mapping[str, Any] | Sequence[str] | None = None,
    *,
    networks: FunctionalNetworks | None = None,
    noise_model: str = "ols",
    drift: int = 1,
    n_permutations: int = 200,
    permute: str = "shift",
    min_shift: int = 10,
    random_state: int | None = 0,
) -> Localizer:
    """Which neurons or networks respond to which condition.

    Parameters
    ----------
    scans : Scan or list of Scan
        With events (onset and duration in tokens, trial_type).
    contrasts : dict of name -> {condition: weight}, or names of conditions; default all
        A bare name means that condition against the mean of all others.
    networks : FunctionalNetworks, optional
        Test the time courses of these (their own if they are of these scans, else by dual regression) instead of every
        neuron.
    noise_model : {"ols", "ar1"}
        "ar1" is nilearn's prewhitening; its permutations are slow.
    drift : int
        Highest order of the polynomial taken out of every run. The first token of every context block gets a column of
        its own, where the scan knows positions: it is the attention sink, not a response.
    n_permutations : int
        0 for none. The smallest p is ``1 / (n_permutations + 1)``.
    permute : {"shift", "labels"}
        Null: conditions are shifted in a circle against each run by at least `min_shift` tokens (keeps the
        autocorrelation of both), or the events of a run exchange their conditions (block permutation: keeps when events
        are; right where a response does not outlast its event).
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.

    Returns
    -------
    Localizer

    Raises
    ------
    InputError
        If there are no events, a condition is unknown, or no run can estimate a contrast.
    """
    check_option("noise_model", noise_model, NOISE)
    check_option("permute", permute, PERMUTE)
    check_count("n_permutations", n_permutations, 0)
    check_range("drift", drift, 0)
    check_whole("min_shift", min_shift, 1)
    scans = [scans] if isinstance(scans, Scan) else list(scans)
    conditions = _conditions(scans)
    weights = contrast_weights(conditions, contrasts)
    designs = [Design(scan, conditions, drift) for scan in scans]
    found = find_responses(
        designs, _parts(scans, networks), weights, noise_model, n_permutations, permute, int(min_shift), random_state
    )
    space = None if networks is not None else getattr(scans[0], "space", None)
    return Localizer(list(weights), *found, space=space, names=None if networks is None else networks.names)


def find_responses(
    designs: Sequence[Design],
    parts: Iterable[list[Array]],
    weights: Mapping[str, Array],
    noise_model: str,
    n_permutations: int,
    permute: str,
    min_shift: int,
    random_state: int | None,
) -> tuple[Array, Array, Array, Array, Array]:
    """effect, t, z, p_fwe ``(n_contrasts, n_units)`` and null ``(n_contrasts, n_permutations)``; see `localizer`.

    Parameters
    ----------
    designs : one a run
    parts : iterable of list of array ``(n_times, n_units)``
        Some units of all runs at a time.
    weights : dict of array ``(n_conditions,)``
    """
    n_runs = np.array([sum(d.estimable(d.boxcars, w) for d in designs) for w in weights.values()])
    for name, n in zip(weights, n_runs):
        if not n:
            raise InputError(
                f"contrasts[{name!r}] can not be estimated in any run: its conditions are missing, or have no baseline"
            )
    seed = seed_of(random_state)
    models = [[Model(d, d.boxcars, weights) for d in designs]]
    for draw in range(n_permutations):
        rng = np.random.default_rng([seed, draw])
        models.append([Model(d, d.permuted(rng, permute, min_shift), weights) for d in designs])
    null = np.zeros((len(weights), n_permutations))
    effects, ts = [], []
    for part in parts:
        effect, t, dof = fixed_effects(part, models[0], noise_model)
        effects.append(effect)
        ts.append(t)
        for draw, permuted in enumerate(models[1:]):
            largest = np.abs(fixed_effects(part, permuted, noise_model)[1]).max(axis=1)
            null[:, draw] = np.maximum(null[:, draw], largest)
    effect, t = np.concatenate(effects, axis=1), np.concatenate(ts, axis=1)
    beaten = [(np.searchsorted(np.sort(row), np.abs(values) * (1 - 1e-9))) for row, values in zip(null, t)]
    reached = n_permutations - np.array(beaten) if n_permutations else np.full(t.shape, np.nan)
    z = t_to_z(t, np.maximum(dof, 1)[:, None])
    return effect / n_runs[:, None], t, z, (reached + 1) / (n_permutations + 1), null


def contrast_weights(
    conditions: Sequence[str], contrasts: Mapping[str, Any] | Sequence[str] | None
) -> dict[str, Array]:
    """Weights over `conditions` of each contrast; see `localizer`."""
    if isinstance(contrasts, str):
        contrasts = [contrasts]
    named = dict(contrasts) if isinstance(contrasts, Mapping) else {c: c for c in (contrasts or conditions)}
    weights: dict[str, Array] = {}
    for name, what in named.items():
        if isinstance(what, str):
            check_option(f"contrasts[{name!r}]: condition", what, conditions)
            others = max(len(conditions) - 1, 1)
            what = {c: 1.0 if c == what else -1 / others for c in conditions}
        if not isinstance(what, Mapping) or not any(what.values()):
            raise InputError(f"contrasts[{name!r}]={what!r} must be a condition or a dict of condition -> weight")
        for condition, weight in what.items():
            check_option(f"contrasts[{name!r}]: condition", condition, conditions)
            check_range(f"contrasts[{name!r}][{condition!r}]", weight)
        weights[str(name)] = np.array([float(what.get(c, 0)) for c in conditions])
    return weights


def time_courses_of(networks: FunctionalNetworks, scans: Sequence[Scan]) -> Sequence[NDArray[Any]]:
    """The networks' own time courses if they fit the scans token by token, else by dual regression.

    Those of an ICA are of its own runs. Other runs may be as long, so the first is looked at: courses that have little
    in common with what the maps do there are not of it.
    """
    own = networks.time_courses
    fits = [len(course) for course in own] == [int(scan.n_tokens) for scan in scans]
    if fits and ("estimator" not in networks.provenance or _are_of(own[0], networks, scans[0])):
        return own
    from llmbrain.decomposition import dual_regression

    return dual_regression(networks.maps, scans).time_courses


def responses(scan: Scan) -> NDArray[np.bool_]:
    """Which tokens of a scan are a response to text, ``(n_tokens,)``: all but the first of each context block, where
    the scan knows positions. These are the attention sink, with activations a thousand times the others'."""
    positions = getattr(scan, "positions", None)
    return np.ones(int(scan.n_tokens), dtype=bool) if positions is None else np.asarray(positions) > 0


def _are_of(course: NDArray[Any], networks: FunctionalNetworks, scan: Scan) -> bool:
    """Whether time courses are of a scan: median ``|r|`` with what z-scored neurons give there above a half."""
    from llmbrain.decomposition import dual_regression

    maps = networks.maps
    if scan.n_tokens <= len(maps) + 1 or np.linalg.matrix_rank(maps - maps.mean(axis=1, keepdims=True)) < len(maps):
        return True  # there is no dual regression to compare with
    found = dual_regression(maps, [scan], standardize=True).time_courses[0]
    real = responses(scan)
    if real.sum() < 3:
        return True
    r = [correlate_rows(a[None], b[None])[0, 0] for a, b in zip(np.asarray(course)[real].T, found[real].T)]
    return bool(np.median(np.abs(r)) > 0.5)


def _conditions(scans: Sequence[Scan]) -> list[str]:
    found = sorted({str(kind) for scan in scans for kind in getattr(scan, "events", {"trial_type": []})["trial_type"]})
    if not found:
        raise InputError("scans have no events: a localizer needs texts with conditions (see Stimulus)")
    return found


def _parts(scans: Sequence[Scan], networks: FunctionalNetworks | None) -> Iterator[list[Array]]:
    """The units of all runs, some at a time: layer by layer, or the networks; float64 ``(n_tokens, n_units)`` a run."""
    if networks is not None:
        yield [np.asarray(course, dtype=np.float64) for course in time_courses_of(networks, scans)]
        return
    spaces = [scan.space for scan in scans]
    if any(space != spaces[0] for space in spaces):
        raise InputError(f"scans lie in different spaces: {', '.join(map(repr, dict.fromkeys(spaces)))}")
    for layer, width in enumerate(spaces[0].widths):
        if width:
            runs = [scan.data(layers=layer).astype(np.float64) for scan in scans]
            for run, scan in zip(runs, scans):
                bad = ~np.isfinite(run).all(axis=0)
                if bad.any():
                    raise InputError(f"scan {scan.name!r} holds nan or inf: layer {layer}, neuron {int(bad.argmax())}")
            yield runs


class Design:
    """Conditions and nuisance of one run."""

    def __init__(self, scan: Any, conditions: Sequence[str], drift: int) -> None:
        self.n_tokens = int(scan.n_tokens)
        self.conditions = list(conditions)
        self.onsets = np.asarray(scan.events["onset"], dtype=float)
        self.durations = np.asarray(scan.events["duration"], dtype=float)
        self.kinds = np.array([self.conditions.index(str(k)) for k in scan.events["trial_type"]], dtype=int)
        self.boxcars = self.boxcars_of(self.kinds)
        ramp = np.linspace(-1, 1, self.n_tokens)
        nuisance = [ramp**order for order in range(drift + 1)]
        starts = np.asarray(getattr(scan, "positions", np.arange(self.n_tokens))) == 0
        self.nuisance = np.column_stack([*nuisance, starts.astype(float)])

    def boxcars_of(self, kinds: NDArray[np.int64]) -> Array:
        """1 where a condition is on; ``(n_tokens, n_conditions)``."""
        token = np.arange(self.n_tokens)[:, None]
        on = (token >= self.onsets) & (token < self.onsets + self.durations)
        columns = [on[:, kinds == k].any(axis=1) for k in range(len(self.conditions))]
        return np.column_stack(columns).astype(float)

    def permuted(self, rng: np.random.Generator, how: str, min_shift: int) -> Array:
        """Boxcars of one draw of the null."""
        if how == "labels":
            return self.boxcars_of(rng.permutation(self.kinds))
        if self.n_tokens <= 2 * min_shift:
            raise InputError(f"a run of {self.n_tokens} tokens is too short for min_shift={min_shift}")
        return circular_shift(self.boxcars, int(rng.integers(min_shift, self.n_tokens - min_shift + 1)))

    def matrix(self, boxcars: Array) -> Array:
        """The whole design matrix, conditions first."""
        return np.column_stack([boxcars, self.nuisance])

    def estimable(self, boxcars: Array, weights: Array) -> bool:
        """Whether the run tells anything about the contrast: it must lie in the row space of the design."""
        if not boxcars[:, weights != 0].any(axis=0).all():
            return False
        x = self.matrix(boxcars)
        full = np.append(weights, np.zeros(self.nuisance.shape[1]))
        return bool(np.allclose(full @ np.linalg.pinv(x) @ x, full, atol=1e-6))


class Model:
    """A design of one run with its contrasts, made ready to fit many units."""

    def __init__(self, design: Design, boxcars: Array, weights: Mapping[str, Array]) -> None:
        self.use = [design.estimable(boxcars, w) for w in weights.values()]
        self.x = design.matrix(boxcars)
        padding = np.zeros(design.nuisance.shape[1])
        self.rows = np.array([np.append(w, padding) for w in weights.values()])[self.use]
        u, sizes, v = np.linalg.svd(self.x, full_matrices=False)
        rank = int((sizes > 1e-10 * sizes[0]).sum())
        self.basis = u[:, :rank].T
        self.contrasts = self.rows @ v[:rank].T / sizes[:rank]  # of the coordinates in the basis
        self.df = float(len(self.x) - rank)

    def ols(self, y: Array) -> tuple[Array, Array]:
        """Effect and its variance, ``(n_contrasts, n_units)``."""
        fit = self.basis @ y
        total = np.einsum("tv,tv->v", y, y)
        residual = total - np.einsum("pv,pv->v", fit, fit)
        sigma2 = np.where(residual > 1e-10 * total, residual, 0) / self.df  # a silent neuron leaves rounding only
        return self.contrasts @ fit, (self.contrasts**2).sum(axis=1)[:, None] * sigma2

    def ar1(self, y: Array) -> tuple[Array, Array]:
        """The same after nilearn's prewhitening."""
        from nilearn.glm.contrasts import compute_contrast
        from nilearn.glm.first_level import run_glm

        labels, results = run_glm(y, self.x, noise_model="ar1")
        fits = [compute_contrast(labels, results, row, stat_type="t") for row in self.rows]
        return np.stack([np.ravel(f.effect) for f in fits]), np.stack([np.ravel(f.variance) for f in fits])


def fixed_effects(runs: Sequence[Array], models: Sequence[Model], noise_model: str) -> tuple[Array, Array, Array]:
    """Effect and variance summed over runs, as nilearn adds contrasts; returns effect, t and degrees of freedom."""
    shape = (len(models[0].use), runs[0].shape[1])
    effect, variance, dof = np.zeros(shape), np.zeros(shape), np.zeros(shape[0])
    for run, model in zip(runs, models):
        if any(model.use):
            e, v = model.ols(run) if noise_model == "ols" else model.ar1(run)
            effect[model.use] += e
            variance[model.use] += v
            dof[model.use] += model.df
    t = np.divide(effect, np.sqrt(variance), out=np.zeros(shape), where=variance > 0)
    return effect, t, dof
