"""Group tests beyond two labels: blocks, subjects, covariates, F, variances of groups, and warnings where they fail."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from llmbrain import InputError
from llmbrain.decomposition import ExchangeabilityWarning, permutation_test, read_fsl_matrix
from llmbrain.decomposition.designs import Model

V = 200


def noise(n, seed=0, v=V):
    return np.random.default_rng(seed).normal(size=(n, 1, v))


def several_runs(n_subjects, n_runs, seed):
    """Runs of a subject share two thirds of their variance; no effect anywhere."""
    rng = np.random.default_rng(seed)
    return np.repeat(rng.normal(size=(n_subjects, 1, V)), n_runs, axis=0) + 0.7 * rng.normal(
        size=(n_subjects * n_runs, 1, V)
    )


def test_f_is_that_of_an_analysis_of_variance():
    y = noise(12)
    y[:4] += 1
    design = np.kron(np.eye(3), np.ones((4, 1)))
    result = permutation_test(y, design=design, contrast=[[1, -1, 0], [0, 1, -1]], n_permutations=99)
    expected = stats.f_oneway(*np.split(y[:, 0], 3)).statistic
    np.testing.assert_allclose(result.t[0], expected, rtol=1e-10)
    assert result.statistic == "F"


def test_t_with_a_covariate_is_that_of_least_squares():
    rng = np.random.default_rng(1)
    age = rng.normal(size=14)
    groups = np.array(["a"] * 8 + ["b"] * 6)
    y = noise(14, 2) + 2 * age[:, None, None]
    found = permutation_test(y, groups=groups, covariates=age, n_permutations=99)
    design = np.column_stack([groups == "a", groups == "b", age - age.mean()]).astype(float)
    beta, rest, *_ = np.linalg.lstsq(design, y[:, 0], rcond=None)
    error = np.sqrt(rest / 11 * (np.array([1, -1, 0]) @ np.linalg.inv(design.T @ design) @ np.array([1, -1, 0])))
    np.testing.assert_allclose(found.t[0], (beta[0] - beta[1]) / error, rtol=1e-10)
    same = permutation_test(y, design=design, contrast=[1, -1, 0], n_permutations=99)
    np.testing.assert_allclose(same.t, found.t, rtol=1e-10)
    np.testing.assert_array_equal(same.p_fwe, found.p_fwe)


def test_welch_is_scipys_and_the_general_form_agrees():
    y = noise(13, 3)
    y[:5] *= 2
    groups = [0] * 5 + [1] * 8
    found = permutation_test(y, groups=groups, statistic="welch", n_permutations=50)
    expected = stats.ttest_ind(y[:5], y[5:], equal_var=False).statistic
    np.testing.assert_allclose(found.t, expected, rtol=1e-10)
    design = np.column_stack([np.ones(13), np.array(groups) == 0]).astype(float)  # the same test, said otherwise
    general = permutation_test(
        y, design=design, contrast=[0, 1], variance_groups=groups, statistic="welch", n_permutations=50
    )
    np.testing.assert_allclose(general.t, found.t, rtol=1e-8)
    np.testing.assert_allclose(
        general.null, permutation_test(y, groups=groups, statistic="welch", n_permutations=50).null
    )


def test_blocks_flip_and_move_as_a_whole():
    y = several_runs(5, 4, 0)
    blocks = np.repeat(list("abcde"), 4)
    result = permutation_test(y, blocks=blocks)
    assert result.exhaustive
    assert result.n_permutations == 2**5 - 1
    assert permutation_test(y, blocks=blocks, groups=np.repeat([0, 0, 1, 1, 1], 4)).n_permutations == 9
    within = permutation_test(y[:8], blocks=blocks[:8], groups=[0, 0, 1, 1] * 2)
    assert within.n_permutations == 6 * 6 - 1
    t = stats.ttest_1samp(y, 0).statistic
    np.testing.assert_allclose(result.t, t)
    signs = np.array([[1, 1, -1, 1, 1]]).repeat(4)[:, None, None]
    assert np.isclose(result.null, np.abs(stats.ttest_1samp(signs * y, 0).statistic).max()).any()


def test_subjects_are_averaged():
    y = several_runs(6, 3, 1)
    subjects = np.repeat(range(6), 3)
    means = y.reshape(6, 3, 1, V).mean(axis=1)
    np.testing.assert_allclose(permutation_test(y, subjects=subjects).p_fwe, permutation_test(means).p_fwe)
    groups = [0] * 9 + [1] * 9
    np.testing.assert_allclose(
        permutation_test(y, subjects=subjects, groups=groups).t, permutation_test(means, groups=[0] * 3 + [1] * 3).t
    )
    conditions = [0, 1, 1] * 6
    differences = np.array([y[3 * i] - y[3 * i + 1 : 3 * i + 3].mean(axis=0) for i in range(6)])
    np.testing.assert_allclose(
        permutation_test(y, subjects=subjects, groups=conditions).t, permutation_test(differences).t
    )


@pytest.mark.parametrize(
    ("make", "options", "level"),
    [
        (lambda seed: several_runs(6, 4, seed), {"blocks": np.repeat(range(6), 4)}, True),
        (lambda seed: several_runs(6, 4, seed), {"subjects": np.repeat(range(6), 4)}, True),
        (lambda seed: several_runs(6, 4, seed), {}, False),
        (lambda seed: noise(25, seed) * np.r_[np.full(5, 2), np.ones(20)][:, None, None],
         {"groups": [0] * 5 + [1] * 20, "statistic": "welch"}, True),
        (lambda seed: noise(25, seed) * np.r_[np.full(5, 2), np.ones(20)][:, None, None],
         {"groups": [0] * 5 + [1] * 20}, False),
        (lambda seed: np.random.default_rng(seed).exponential(size=(20, 1, V)) - 1, {}, False),
        (lambda seed: np.random.default_rng(seed).laplace(size=(20, 1, V)), {}, True),
    ],
    ids=["blocks", "subjects", "runs as subjects", "welch", "pooled", "skewed", "laplace"],
)  # fmt: skip
def test_level_is_held_or_warned_of(make, options, level):
    wrong = warned = 0
    for seed in range(40):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = permutation_test(make(seed), n_permutations=99, random_state=1000 + seed, **options)
        wrong += bool((found.p_fwe <= 0.05).any())
        warned += any(w.category is ExchangeabilityWarning for w in caught)
    if level:
        assert wrong <= 6  # of 40; a test at .05 exceeds this in 3 of 1,000 tries
        assert warned <= 2
    else:
        assert wrong > 15
        assert warned >= 38


def test_names_of_runs_say_that_subjects_come_twice():
    names = [f"run {i} (sub-{i // 2:02d}_run-{i % 2})" for i in range(8)]
    maps = SimpleNamespace(maps=noise(8), names=names)
    with pytest.warns(ExchangeabilityWarning, match="8 maps come from 4 subjects"):
        permutation_test(maps, n_permutations=19)


def test_fsl_files(tmp_path):
    (tmp_path / "d.mat").write_text("/NumWaves\t2\n/NumPoints\t6\n\n/Matrix\n" + "1 0\n" * 3 + "0 1\n" * 3)
    (tmp_path / "d.con").write_text("/ContrastName1 a-b\n/NumWaves 2\n/NumContrasts 1\n/Matrix\n1.0e+00 -1\n")
    y = noise(6, 5)
    found = permutation_test(y, design=tmp_path / "d.mat", contrast=tmp_path / "d.con")
    plain = permutation_test(y, groups=[0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(found.t, plain.t, rtol=1e-10)
    assert read_fsl_matrix(tmp_path / "d.mat").shape == (6, 2)
    (tmp_path / "bad.mat").write_text("1 0\n0 1\n")
    with pytest.raises(InputError, match="no line /Matrix"):
        read_fsl_matrix(tmp_path / "bad.mat")
    (tmp_path / "two.con").write_text("/Matrix\n1 -1\n-1 1\n")
    with pytest.raises(InputError, match="depend on each other"):
        permutation_test(y, design=tmp_path / "d.mat", contrast=tmp_path / "two.con")


def test_mean_of_a_design_is_tested_by_flips():
    y = noise(8, 6)
    found = permutation_test(y, design=np.ones((8, 1)), contrast=[1])
    np.testing.assert_allclose(found.p_fwe, permutation_test(y).p_fwe)


def test_partition_is_orthogonal():
    rng = np.random.default_rng(0)
    design = rng.normal(size=(10, 4))
    model = Model.of(design, [[1, 0, -1, 0], [0, 1, 0, 0]])
    both = np.column_stack([model.effect, model.nuisance])
    np.testing.assert_allclose(both.T @ both, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(both @ (both.T @ design), design, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"design": np.ones((6, 1))}, "go together"),
        ({"design": np.ones((6, 2)), "contrast": [1, 0]}, "rank 1 for 2 regressors"),
        ({"design": np.ones((5, 1)), "contrast": [1]}, "a row is needed for each of 6 runs"),
        ({"design": np.ones((6, 1)), "contrast": [1, 0]}, "contrast has 2 columns"),
        ({"subjects": [0, 0, 1, 1, 2, 2], "blocks": [0] * 6}, "pass one of them"),
        ({"statistic": "welch"}, "needs groups= or variance_groups="),
        ({"blocks": [0] * 5}, "blocks has 5 labels for 6 runs"),
        ({"groups": [0, 0, 0, 1, 1, 1], "blocks": [0, 0, 0, 1, 1, 1], "variance_groups": [0] * 6}, "no use"),
        ({"subjects": [0, 0, 1, 1, 2, 2], "groups": [0, 1, 0, 0, 1, 1]}, "runs of one group only"),
        ({"covariates": [1, 2, np.nan, 3, 4, 5]}, "covariates holds NaN"),
        ({"statistic": "robust"}, "statistic='robust'"),
    ],
)
def test_bad_designs_are_named(options, named):
    with pytest.raises(InputError, match=named):
        permutation_test(noise(6), **options)
