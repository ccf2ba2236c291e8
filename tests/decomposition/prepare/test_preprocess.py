"""Preprocessing of a run."""

from __future__ import annotations

import numpy as np
import torch

from llmbrain.decomposition.prepare.preprocess import Preprocessing, prepare


def test_detrending_takes_polynomials_out_and_leaves_the_callers_data_alone(data):
    rng = np.random.default_rng(0)
    time = np.linspace(-1, 1, 90)
    run = rng.normal(size=(90, 50)) + np.vander(time, 4) @ rng.normal(size=(4, 50)) * 5
    before = run.copy()
    for detrend, degree in [("none", 0), ("linear", 1), (3, 3)]:
        ready = prepare(run, Preprocessing(detrend=detrend, standardize="center", drop_first=4), dtype=torch.float64)
        fit = np.polynomial.polynomial.polyfit(time[4:], run[4:], degree)
        expected = run - np.polynomial.polynomial.polyval(time, fit).T
        np.testing.assert_allclose(ready.data.numpy(), expected, atol=1e-10)
    np.testing.assert_array_equal(run, before)
