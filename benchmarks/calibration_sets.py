"""Tests over runs and neurons, for `calibration.py`: permutation tests, reproducibility, cut-offs, lesions, order."""

from __future__ import annotations

import numpy as np
import torch
from calibration_cases import register

from llmbrain.anatomy.space import NeuronSpace
from llmbrain.datasets.fmri_phantom import ar_noise
from llmbrain.decomposition import GroupICA, permutation_test, split_half_reproducibility
from llmbrain.intervention.controls import matched_masks, random_masks
from llmbrain.networks import FunctionalNetworks, match_networks, null_networks, recurrence, split_half

torch.set_num_threads(1)


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


# -- permutation_test --------------------------------------------------------------------------------------------------

NEURONS = 100


def _skewed(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.exponential(size=(n, 1, NEURONS)) - 1


def _people(rng: np.random.Generator) -> np.ndarray:
    return np.repeat(rng.normal(size=(5, 1, NEURONS)), 4, axis=0) + 0.5 * rng.normal(size=(20, 1, NEURONS))


RUNS = {
    "20 runs": lambda rng: (rng.normal(size=(20, 1, NEURONS)), {}),
    "8 runs": lambda rng: (rng.normal(size=(8, 1, NEURONS)), {}),
    "20 runs, Laplace": lambda rng: (rng.laplace(size=(20, 1, NEURONS)), {}),
    "20 runs, one-sided": lambda rng: (rng.normal(size=(20, 1, NEURONS)), {"two_sided": False}),
    "20 runs, skewed": lambda rng: (_skewed(rng, 20), {}),
    "6 against 6": lambda rng: (rng.normal(size=(12, 1, NEURONS)), {"groups": ["a"] * 6 + ["b"] * 6}),
    "6 against 6, skewed": lambda rng: (_skewed(rng, 12), {"groups": ["a"] * 6 + ["b"] * 6}),
    "5 against 20": lambda rng: (rng.normal(size=(25, 1, NEURONS)), {"groups": ["a"] * 5 + ["b"] * 20}),
    "5 of SD 2 against 20 of SD 1": lambda rng: (
        rng.normal(size=(25, 1, NEURONS)) * np.r_[np.full(5, 2.0), np.ones(20)][:, None, None],
        {"groups": ["a"] * 5 + ["b"] * 20},
    ),
    "the same, welch": lambda rng: (
        rng.normal(size=(25, 1, NEURONS)) * np.r_[np.full(5, 2.0), np.ones(20)][:, None, None],
        {"groups": ["a"] * 5 + ["b"] * 20, "statistic": "welch"},
    ),
    "10 pairs": lambda rng: (
        rng.normal(size=(20, 1, NEURONS)) + np.repeat(rng.normal(size=(10, 1, NEURONS)), 2, axis=0),
        {"groups": ["a", "b"] * 10, "pairs": np.repeat(np.arange(10), 2).tolist()},
    ),
    "5 subjects of 4 runs as 20 runs": lambda rng: (_people(rng), {}),
    "the same, subjects=": lambda rng: (_people(rng), {"subjects": np.repeat(np.arange(5), 4).tolist()}),
    "12 subjects of 2 runs, subjects=": lambda rng: (
        np.repeat(rng.normal(size=(12, 1, NEURONS)), 2, axis=0) + 0.5 * rng.normal(size=(24, 1, NEURONS)),
        {"subjects": np.repeat(np.arange(12), 2).tolist()},
    ),
    "12 subjects of 2 runs, blocks=": lambda rng: (
        np.repeat(rng.normal(size=(12, 1, NEURONS)), 2, axis=0) + 0.5 * rng.normal(size=(24, 1, NEURONS)),
        {"blocks": np.repeat(np.arange(12), 2).tolist()},
    ),
    "8 against 8 with age": lambda rng: _with_age(rng),
    "F of 3 groups of 6": lambda rng: (
        rng.normal(size=(18, 1, NEURONS)),
        {"design": np.kron(np.eye(3), np.ones((6, 1))), "contrast": [[1, -1, 0], [0, 1, -1]]},
    ),
}


def _with_age(rng: np.random.Generator) -> tuple[np.ndarray, dict[str, object]]:
    age = rng.normal(size=16) + np.r_[np.zeros(8), np.ones(8)]
    data = rng.normal(size=(16, 1, NEURONS)) + age[:, None, None] * rng.normal(size=NEURONS)
    return data, {"groups": ["a"] * 8 + ["b"] * 8, "covariates": age}


@register("permutation_test", f"largest of {NEURONS} neurons", runs=tuple(RUNS))
def runs_and_groups(rng: np.random.Generator, runs: str) -> float:
    """Maps without an effect."""
    data, options = RUNS[runs](rng)
    return float(permutation_test(data, n_permutations=99, random_state=_seed(rng), **options).p_fwe.min())


# -- reproducibility and cut-offs --------------------------------------------------------------------------------------


def _scans(rng: np.random.Generator, data: str, n_runs: int, n_tokens: int, n_neurons: int) -> list[np.ndarray]:
    """Runs without networks."""
    ar = 0.9 if data == "AR 0.9" else 0.0
    runs = [ar_noise(rng, (n_tokens, n_neurons), ar) for _ in range(n_runs)]
    if data == "uneven, heavy tails":
        runs = [run * np.exp(rng.normal(size=n_neurons)) * rng.standard_t(4, size=run.shape) ** 2 for run in runs]
    if data == "smooth image":
        kernel = np.exp(-0.5 * (np.arange(-12, 13) / 4) ** 2)
        runs = [np.apply_along_axis(np.convolve, 1, run, kernel, "same") for run in runs]
    return runs


DATA = ("AR 0", "AR 0.9", "uneven, heavy tails", "smooth image")


@register("split_half_reproducibility", "the most reproducible component", data=DATA)
def halves(rng: np.random.Generator, data: str) -> float:
    """Runs without networks."""
    found = split_half_reproducibility(_scans(rng, data, 2, 40, 150), 2, n_splits=1, n_permutations=19,
                                       random_state=_seed(rng) % 2**31, tol=1e-3, max_iter=10)  # fmt: skip
    return float(found.p.min())


@register("networks.split_half", "the pair of networks that match best", data=DATA)
def matched_halves(rng: np.random.Generator, data: str) -> float:
    """Runs without networks."""
    found = split_half(_scans(rng, data, 2, 60, 300), 3, n_permutations=39, random_state=_seed(rng), tol=1e-3,
                       max_iter=10)  # fmt: skip
    return float(found.p.min())


@register("null_networks", "any neuron in any network, cut-off against the null", data=DATA, cut=("fwe", "fdr"))
def cutoffs(rng: np.random.Generator, data: str, cut: str) -> float:
    """Runs without networks."""
    scans = _scans(rng, data, 2, 40, 150)
    options = {"tol": 1e-3, "max_iter": 10, "random_state": _seed(rng)}
    null = null_networks(scans, 2, n_permutations=19, progress=False, **options)
    networks = FunctionalNetworks.from_ica(GroupICA(2, **options).fit(scans))
    return 0.0 if networks.rethreshold(cut, null=null).masks.any() else 1.0


def _networks(rng: np.random.Generator, k: int, widths: tuple[int, ...] = (60, 60, 60)) -> FunctionalNetworks:
    loud = np.exp(rng.normal(size=len(widths)))  # layers differ, in all models alike
    scale = np.repeat(loud, widths)
    return FunctionalNetworks(rng.laplace(size=(k, sum(widths))) * scale, NeuronSpace(widths), threshold=1.5)


@register("match_networks", "the pair that matches best", networks=(3, 10))
def matches(rng: np.random.Generator, networks: int) -> float:
    """Networks of two models that have nothing to do with each other."""
    found = match_networks(_networks(rng, networks), _networks(rng, networks), n_permutations=39,
                           random_state=_seed(rng))  # fmt: skip
    return float(found.p.min())


@register("recurrence", "p of the overlap, and of the rate; one template in twenty runs", p=("p_overlap", "p"))
def returns(rng: np.random.Generator, p: str) -> float:
    """Runs that do not know the template."""
    small = (30, 30, 30)
    runs = [_networks(rng, 4, small) for _ in range(20)]
    found = recurrence(_networks(rng, 1, small), runs, threshold=0.15, n_permutations=39,
                       random_state=_seed(rng))  # fmt: skip
    return float(found[p].iloc[0])


# -- number of components ----------------------------------------------------------------------------------------------


@register("GroupICA(n_components=)", "share of runs in which more than 7 components are found for 5", at_most=True,
          n_components=("auto", "parallel"), noise=("AR 0", "AR 0.6", "AR 0.9", "moving average of 9"))  # fmt: skip
def order(rng: np.random.Generator, n_components: str, noise: str) -> float:
    """Five components, noise of some color over tokens."""
    T, V = 150, 400
    maps = rng.laplace(size=(5, V)) * (rng.random((5, V)) < 0.2)
    if noise.startswith("AR"):
        own, courses = ar_noise(rng, (T, V), float(noise[3:])), ar_noise(rng, (T, 5), float(noise[3:]))
    else:
        kernel = np.hanning(9) / np.linalg.norm(np.hanning(9))
        own, courses = (np.apply_along_axis(np.convolve, 0, rng.normal(size=(T, n)), kernel, "same") for n in (V, 5))
    ica = GroupICA(n_components, max_iter=1, random_state=_seed(rng)).fit([courses @ maps + own])
    return 0.0 if ica.n_components_ > 7 else 1.0


# -- interventions -----------------------------------------------------------------------------------------------------


@register("lesion_table", "harm follows how loud a neuron is; the same control sets as in curves",
          control=("matched", "random"), neurons=(5, 20, 40))  # fmt: skip
def lesions(rng: np.random.Generator, control: str, neurons: int) -> float:
    """A random network; its effect is the sum of what its neurons do."""
    space = NeuronSpace([172] * 4)
    level = np.exp(rng.normal(size=space.n_neurons))
    levels = np.stack([level, level * np.exp(0.3 * rng.normal(size=space.n_neurons))])
    mask = np.zeros(space.n_neurons, dtype=bool)
    for layer in range(4):
        part = space.layer_slice(layer)
        mask[part.start + rng.choice(172, neurons, replace=False)] = True
    effect = rng.normal(size=space.n_neurons) * level
    sets = matched_masks(mask, space, levels, 20, rng) if control == "matched" else random_masks(mask, space, 20, rng)
    assert sets is not None
    reached = np.abs(sets @ effect) >= np.abs(effect[mask].sum()) * (1 - 1e-9)
    return float((1 + reached.sum()) / 21)
