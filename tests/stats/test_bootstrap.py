"""The bootstrap of a mean: against the normal interval, and with values missing."""

import numpy as np
from scipy import stats

from llmbrain.stats.bootstrap import bootstrap_mean


def test_interval_is_the_normal_one_for_many_items():
    x = np.random.default_rng(0).normal(3, 2, size=(400, 2))
    low, high = bootstrap_mean(x, 4000, 0.9, np.random.default_rng(1))
    half = stats.norm.ppf(0.95) * x.std(axis=0) / 20
    np.testing.assert_allclose(low, x.mean(axis=0) - half, atol=0.02)
    np.testing.assert_allclose(high, x.mean(axis=0) + half, atol=0.02)


def test_missing_values_are_left_out():
    x = np.random.default_rng(0).normal(size=(30, 3))
    x[4, 1] = np.nan
    x[:, 2] = np.nan
    low, high = bootstrap_mean(x, 500, 0.95, np.random.default_rng(1))
    whole = bootstrap_mean(x[:, 0], 500, 0.95, np.random.default_rng(1))
    np.testing.assert_allclose((low[0], high[0]), whole)
    assert low[1] < np.nanmean(x[:, 1]) < high[1]
    assert np.isnan([low[2], high[2]]).all()
    assert np.isnan(bootstrap_mean([1.0], 10, 0.95, np.random.default_rng(0))).all()
