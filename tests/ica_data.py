"""Planted components for the tests of group ICA, and what they are compared with."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

K, V, T = 6, 4000, 150
WIDTHS = (1200, 800, 2000)


def matched(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """|r| of rows, paired one to one."""
    r = np.abs(np.corrcoef(first, second)[: len(first), len(first) :])
    return r[linear_sum_assignment(-r)]


def planted(n_runs: int = 3, *, noise: float = 0.3, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Sparse maps and runs of them; every neuron has about the same variance, so that z-scoring changes no map."""
    rng = np.random.default_rng(seed)
    maps = np.zeros((K, V))
    for k, members in enumerate(np.array_split(rng.permutation(V)[: V // 2], K)):
        maps[k, members] = rng.choice([-1, 1], members.size, p=[0.2, 0.8]) * rng.uniform(0.8, 1.2, members.size)
    idle = np.where(np.abs(maps).sum(axis=0) > 0, noise, 1.0)
    runs = [
        (rng.laplace(size=(T, K)) @ maps + idle * rng.normal(size=(T, V)) + 5).astype(np.float32) for _ in range(n_runs)
    ]
    return maps, runs


class Run:
    """Anything with ``.data()`` is a run."""

    def __init__(self, array, *, positions=None):
        self.array, self.positions, self.name = array, positions, ""

    def data(self):
        return self.array


def prepared(run: np.ndarray) -> np.ndarray:
    """The default preprocessing, in float64 numpy."""
    z = (run - run.mean(axis=0, dtype=float)) / run.std(axis=0, dtype=float)
    return z - z.mean(axis=1, keepdims=True)
