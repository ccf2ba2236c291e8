"""Streamed moments against numpy."""

from __future__ import annotations

import numpy as np
import torch

from llmbrain.pruning.calibrate.moments import Moments


def test_moments_of_drifting_batches_are_exact():
    """Forty batches whose mean moves, as fails FLAP's running variance; and a mean of a thousand sigma."""
    rng = np.random.default_rng(0)
    batches = [1000 + 0.1 * b + rng.normal(size=(50, 5)) for b in range(40)]
    targets = [b @ np.ones((5, 2)) + rng.normal(size=(50, 2)) for b in batches]
    moments = Moments()
    for x, t in zip(batches, targets):
        moments.add(torch.from_numpy(x), torch.from_numpy(t))
    x, t = np.concatenate(batches), np.concatenate(targets)
    both = np.cov(x.T, t.T, ddof=0)
    assert np.allclose(moments.variance, x.var(0), rtol=1e-3)
    assert np.allclose(moments.covariance, both[:5, :5], atol=2e-3)
    assert np.allclose(moments.cross_covariance, both[5:, :5], atol=5e-3)
    assert np.allclose(moments.mean, x.mean(0), rtol=1e-6)


def test_weighted_moments_equal_repeated_tokens():
    rng = np.random.default_rng(1)
    x, t, w = rng.normal(size=(30, 4)), rng.normal(size=(30, 2)), rng.integers(0, 4, 30)
    weighted, repeated = Moments(), Moments()
    weighted.add(torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(w).float())
    repeated.add(torch.from_numpy(np.repeat(x, w, 0)), torch.from_numpy(np.repeat(t, w, 0)))
    assert torch.allclose(weighted.covariance, repeated.covariance, atol=1e-6)
    assert torch.allclose(weighted.cross_covariance, repeated.cross_covariance, atol=1e-6)
    assert torch.allclose(weighted.mean, repeated.mean, atol=1e-6)
