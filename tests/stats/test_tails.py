"""Tails: against scipy where it has digits, against arbitrary precision where it has none."""

import mpmath
import numpy as np
import pytest
from scipy import stats

from llmbrain.stats.tails import benjamini_hochberg, permutation_p, t_to_z


def exact_z(t: float, df: float) -> float:
    """By the incomplete beta function and the normal tail, both with 60 digits."""
    with mpmath.workdps(60):
        t, df = mpmath.mpf(t), mpmath.mpf(df)
        tail = mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True) / 2
        start = mpmath.sqrt(max(-2 * mpmath.log(tail), 1))
        log_tail = mpmath.log(tail)
        return float(mpmath.findroot(lambda z: mpmath.log(mpmath.erfc(z / mpmath.sqrt(2)) / 2) - log_tail, start))


@pytest.mark.parametrize("df", [1, 3, 40.5, 4000])
def test_z_has_the_tail_of_t(df):
    t = np.array([-8.0, -1, 0, 0.5, 3, 6])
    expected = np.sign(t) * stats.norm.isf(stats.t.sf(np.abs(t), df))
    np.testing.assert_allclose(t_to_z(t, df), expected, atol=1e-10)
    far = t_to_z(np.linspace(0, 400, 20001), df)
    assert np.isfinite(far).all()
    assert (np.diff(far) > 0).all()


@pytest.mark.parametrize(("t", "df"), [(400, 500), (40, 1e5), (39, 3000), (1e6, 60), (200, 250), (37.5, 1e7)])
def test_far_tails_on_both_sides(t, df):
    expected = exact_z(t, df)
    np.testing.assert_allclose(t_to_z([t, -t], df), [expected, -expected], rtol=1e-9)
    assert stats.t.sf(t, df) < 1e-200  # the far tail indeed


def test_z_of_a_t_of_400_is_not_400():
    assert float(t_to_z(400, 500)) == pytest.approx(53.7, abs=0.05)
    assert float(t_to_z(-400, 500)) == pytest.approx(-53.7, abs=0.05)


def test_degrees_of_freedom_broadcast_and_odd_values_pass():
    z = t_to_z([[2.0, np.nan, np.inf], [2.0, -np.inf, 0.0]], np.array([[4], [1e9]]))
    assert z[0, 0] == pytest.approx(stats.norm.isf(stats.t.sf(2, 4)))
    assert z[1, 0] == pytest.approx(2, abs=1e-6)
    assert np.isnan(z[0, 1])
    assert z[0, 2] == np.inf
    assert z[1, 1] == -np.inf
    assert z[1, 2] == 0


def test_fdr_is_scipys_and_leaves_nan():
    p = np.random.default_rng(0).random((6, 5)) ** 2
    np.testing.assert_allclose(benjamini_hochberg(p).ravel(), stats.false_discovery_control(p.ravel()), atol=1e-14)
    p[2, 3] = np.nan
    q = benjamini_hochberg(p)
    assert np.argwhere(np.isnan(q)).tolist() == [[2, 3]]
    known = ~np.isnan(p)
    np.testing.assert_allclose(q[known], stats.false_discovery_control(p[known]))
    assert np.isnan(benjamini_hochberg([np.nan, np.nan])).all()
    # by hand: .01 * 4, .02 * 4 / 2, .03 * 4 / 3 and .9
    np.testing.assert_allclose(benjamini_hochberg([0.02, 0.9, 0.01, 0.03]), [0.04, 0.9, 0.04, 0.04])


def test_permutation_p_counts_the_observation():
    np.testing.assert_allclose(permutation_p([1.0, 2.0, np.nan], [0, 19, 3], 19), [0.05, 1.0, np.nan])
