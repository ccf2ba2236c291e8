"""A small space and values in it, for tests of images."""

from __future__ import annotations

import numpy as np

import llmbrain as lb

SPACE = lb.NeuronSpace([30, 17, 24])


def values(n: int | None = 5, space: lb.NeuronSpace = SPACE, seed: int = 0) -> np.ndarray:
    shape = (space.n_neurons,) if n is None else (n, space.n_neurons)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
