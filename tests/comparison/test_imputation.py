"""What a nuisance took from a series is filled in as a series of its memory would have it."""

import numpy as np
import pytest

from llmbrain.brains.series import orthonormal
from llmbrain.comparison import couple
from llmbrain.comparison.imputation import imputation
from llmbrain.datasets.fmri_phantom import ar_noise

T = 200


def test_draws_have_the_variance_and_the_memory_of_what_is_missing():
    rng = np.random.default_rng(0)
    basis = orthonormal(ar_noise(rng, (T, 6), 0.95), T)
    series = ar_noise(rng, (T, 400), 0.8)
    series -= series.mean(axis=0)
    left = series - basis @ (basis.T @ series)
    filler = imputation(left, basis, 0)
    filled = left + filler.draw(rng)
    np.testing.assert_allclose(filled - basis @ (basis.T @ filled), left, atol=1e-9)  # what was left stays
    true, made = (np.square(filler.basis.T @ values).mean(axis=1) for values in (series, filled))
    np.testing.assert_allclose(made, true, rtol=0.35)
    lag = [float((v[1:] * v[:-1]).sum() / (v**2).sum()) for v in (series, left, filled)]
    assert abs(lag[2] - lag[0]) < 0.5 * abs(lag[1] - lag[0])


def test_the_mean_of_draws_is_the_best_guess_and_columns_that_go_together_are_filled_together():
    rng = np.random.default_rng(1)
    basis = orthonormal(np.eye(T)[:, [50, 120]], T)  # two volumes are missing
    one = ar_noise(rng, (T, 1), 0.96)
    series = np.column_stack([one, one + 0.01 * ar_noise(rng, (T, 1), 0.96), ar_noise(rng, (T, 1), 0.96)])
    series -= series.mean(axis=0)
    filler = imputation(series - basis @ (basis.T @ series), basis, 0)
    draws = np.array([filler.draw(rng)[[50, 120]] for _ in range(300)])
    beside = (series[[49, 119]] + series[[51, 121]]) / 2
    left = series - basis @ (basis.T @ series)
    np.testing.assert_allclose(left[[50, 120]] + draws.mean(axis=0), beside, atol=0.15)
    assert np.corrcoef(draws[:, 0, 0], draws[:, 0, 1])[0, 1] > 0.95
    assert abs(np.corrcoef(draws[:, 0, 0], draws[:, 0, 2])[0, 1]) < 0.4


@pytest.mark.parametrize("ar", [0.95, 0.0])
def test_the_level_is_held_with_smooth_and_with_rough_nuisance(ar):
    """Moving the residual alone gives .19 with smooth regressors; moving the series gives .69 with rough ones."""
    p = []
    for i in range(60):
        rng = np.random.default_rng([2, i])
        known = ar_noise(rng, (T, 14), ar)
        x, y = (ar_noise(rng, (T, n), 0.6) + known @ rng.normal(size=(14, n)) for n in (2, 3))
        p.append(np.nanmin(couple(x, y, nuisance=known, n_permutations=39, lags=[0], random_state=i).p_corrected))
    assert np.mean(np.array(p) <= 0.05) <= 0.15
    assert np.mean(np.array(p) <= 0.3) >= 0.1  # and not too timid


def test_long_series_take_the_memory_they_show():
    rng = np.random.default_rng(3)
    basis = orthonormal(rng.normal(size=(1600, 1)), 1600)
    series = ar_noise(rng, (1600, 1), 0.7)
    left = series - basis @ (basis.T @ series)
    assert np.isfinite(imputation(left, basis, 2).draw(rng)).all()
