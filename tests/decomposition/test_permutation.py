"""Permutation tests against brute force, scipy and the phantom."""

import warnings
from itertools import product
from math import comb

import numpy as np
import pytest
from scipy import stats

from llmbrain import InputError
from llmbrain.datasets.phantom import make_phantom
from llmbrain.decomposition.dual_regression import dual_regression
from llmbrain.decomposition.permutation import permutation_test


def test_sign_flips_equal_brute_force():
    y = np.random.default_rng(1).standard_normal((6, 2, 5)) + 0.8
    result = permutation_test(y, n_permutations=1000)
    assert result.exhaustive
    assert result.n_permutations == 2**6 - 1
    np.testing.assert_allclose(result.t, stats.ttest_1samp(y, 0).statistic)
    flips = np.array(
        [stats.ttest_1samp(np.array(s)[:, None, None] * y, 0).statistic for s in product([1, -1], repeat=6)]
    )
    tied = np.abs(flips) >= np.abs(result.t) - 1e-9
    np.testing.assert_allclose(result.p, tied.mean(axis=0))
    largest = np.abs(flips).max(axis=2)
    expected = (largest[:, :, None] >= np.abs(result.t) - 1e-9).mean(axis=0)
    np.testing.assert_allclose(result.p_fwe, expected)
    together = permutation_test(y, n_permutations=1000, family="all")
    largest = largest.max(axis=1)
    np.testing.assert_allclose(together.p_fwe, (largest[:, None, None] >= np.abs(result.t) - 1e-9).mean(axis=0))


def test_label_permutations_equal_scipy():
    rng = np.random.default_rng(2)
    y = rng.standard_normal((9, 1, 4))
    groups = ["b", "a", "a", "b", "a", "b", "a", "a", "b"]
    first = np.array(groups) == "b"
    result = permutation_test(y, groups=groups)
    assert result.n_permutations == comb(9, 4) - 1
    np.testing.assert_allclose(result.t, stats.ttest_ind(y[first], y[~first]).statistic)

    def t(x, z, axis):
        return stats.ttest_ind(x, z, axis=axis).statistic

    exact = stats.permutation_test((y[first, 0], y[~first, 0]), t, n_resamples=np.inf, axis=0, alternative="greater")
    one_sided = permutation_test(y, groups=groups, two_sided=False)
    np.testing.assert_allclose(one_sided.p[0], exact.pvalue, atol=1e-12)


def test_pairs_are_sign_flips_of_differences():
    rng = np.random.default_rng(3)
    y = rng.standard_normal((8, 2, 6))
    paired = permutation_test(y, groups=["on", "off"] * 4, pairs=[0, 0, 1, 1, 2, 2, 3, 3])
    differences = permutation_test(y[::2] - y[1::2])
    np.testing.assert_array_equal(paired.t, differences.t)
    np.testing.assert_array_equal(paired.p_fwe, differences.p_fwe)


def test_family_wise_error_is_held_and_effects_are_found():
    rng = np.random.default_rng(4)
    false, n = 0, 200
    for i in range(n):
        noise = rng.standard_normal((12, 1, 30))
        false += (
            permutation_test(noise, groups=[0] * 6 + [1] * 6, n_permutations=99, random_state=i).p_fwe <= 0.05
        ).any()
    assert false / n < 0.05 + 3 * np.sqrt(0.05 * 0.95 / n)
    effect = rng.standard_normal((20, 1, 30))
    effect[:10, 0, :3] += 3
    found = permutation_test(effect, groups=[0] * 10 + [1] * 10, n_permutations=999).p_fwe[0] <= 0.05
    assert found[:3].all()
    assert not found[3:].any()
    uncorrected = permutation_test(rng.standard_normal((12, 1, 400)), n_permutations=199).p
    assert (uncorrected <= 0.05).mean() == pytest.approx(0.05, abs=0.035)


def test_condition_effect_of_the_phantom_is_found_in_its_network_only():
    kwargs = {"n_sources": 3, "n_neurons": 400, "n_layers": 4, "n_tokens": 100, "jitter": 0.1, "presence": 1}
    low = make_phantom(n_runs=6, amplitude_sd=0.05, **kwargs)
    result = dual_regression(low.maps, low.scans)
    scaled = result.maps.copy()
    scaled[3:, 1] *= 1.5
    test = permutation_test(scaled, groups=["low"] * 3 + ["high"] * 3, two_sided=True)
    assert test.n_permutations == 19
    strong = np.abs(low.maps) > np.quantile(np.abs(low.maps), 0.99)
    sign = -np.sign(low.maps[1, strong[1]])
    assert (test.t[1, strong[1]] * sign > 0).mean() > 0.9
    assert test.p_fwe.min() >= 1 / 20


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"groups": [0, 1]}, "groups has 2 labels for 4 runs"),
        ({"groups": [0, 1, 2, 0]}, "exactly 2"),
        ({"pairs": [0, 0, 1, 1]}, "pairs needs groups"),
        ({"groups": [0, 0, 1, 1], "pairs": [0, 0, 1, 1]}, "pairs: 0 must name two runs"),
        ({"family": "both"}, "family='both'"),
        ({"n_permutations": 0}, "n_permutations=0"),
    ],
)
def test_bad_designs_are_named(options, named):
    with pytest.raises(InputError, match=named):
        permutation_test(np.zeros((4, 1, 3)), **options)


@pytest.mark.parametrize(
    ("options", "n", "floor"),
    [
        ({}, 5, "0.062"), ({"two_sided": False}, 4, "0.062"), ({"groups": ["a"] * 3 + ["b"] * 3}, 6, "0.100"),
        ({"subjects": [0, 0, 1, 1, 2, 2, 3, 3]}, 8, "0.125"), ({}, 6, None), ({"two_sided": False}, 5, None),
        ({"groups": ["a"] * 4 + ["b"] * 4}, 8, None),
    ],
)  # fmt: skip
def test_too_few_arrangements_for_anything_to_be_significant_are_said(options, n, floor):
    maps = np.random.default_rng(0).normal(size=(n, 1, 10))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = permutation_test(maps, **options)
    lines = [str(w.message) for w in said if "arrangements" in str(w.message)]
    assert len(lines) == (floor is not None)
    assert floor is None or f"no p is below {floor}" in lines[0]
    smallest = permutation_test(maps + 50, **options).p_fwe.min() if "groups" not in options else found.p.min()
    if floor is not None:
        assert smallest >= float(floor) - 5e-4
