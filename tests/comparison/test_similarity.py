"""CKA and RSA: against closed forms, and without what neighbours in time share."""

import numpy as np
import pytest
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr

from llmbrain import InputError
from llmbrain.brains.series import prepare, standardize
from llmbrain.comparison.similarity import compare_similarity, debiased_cka, rsa
from llmbrain.datasets.fmri_phantom import ar_noise


def unbiased_hsic(k, m):
    """Song et al. 2012, equation 5, written out."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def test_cka_is_the_ratio_of_unbiased_hsics():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)), rng.normal(size=(40, 7))
    y[:, :3] += x[:, :3]
    k, m = (standardize(s) @ standardize(s).T for s in (x, y))
    expected = unbiased_hsic(k, m) / np.sqrt(unbiased_hsic(k, k) * unbiased_hsic(m, m))
    assert debiased_cka(x, y) == pytest.approx(expected, abs=1e-12)


def test_cka_knows_rotations_and_is_not_fooled_by_many_features():
    rng = np.random.default_rng(0)
    x = standardize(rng.normal(size=(60, 8)))
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert debiased_cka(x, standardize(x @ rotation)) > 0.9
    wide = [debiased_cka(rng.normal(size=(60, 2000)), rng.normal(size=(60, 2000))) for _ in range(5)]
    assert np.abs(wide).max() < 0.1  # plain CKA gives .97 here


def test_rsa_is_spearman_of_distances():
    rng = np.random.default_rng(0)
    x, y = (standardize(rng.normal(size=(30, 6))) for _ in range(2))
    assert rsa(x, y) == pytest.approx(spearmanr(pdist(x, "correlation"), pdist(y, "correlation")).statistic)
    assert rsa(x, y, distance="euclidean") == pytest.approx(spearmanr(pdist(x), pdist(y)).statistic)
    far = np.array([j - i > 5 for i in range(30) for j in range(i + 1, 30)])
    expected = spearmanr(pdist(x, "correlation")[far], pdist(y, "correlation")[far]).statistic
    assert rsa(x, y, exclude=5) == pytest.approx(expected)


@pytest.mark.parametrize("measure", ["cka", "rsa"])
def test_near_diagonal_makes_unrelated_smooth_series_similar(measure):
    rng = np.random.default_rng(0)
    function = {"cka": debiased_cka, "rsa": rsa}[measure]
    near, far = [], []
    for _ in range(8):
        x, y = ar_noise(rng, (200, 30), 0.9), ar_noise(rng, (200, 30), 0.9)
        near.append(function(x, y))
        far.append(function(x, y, exclude=30))
    assert np.mean(near) > 0.15
    assert abs(np.mean(far)) < 0.05


@pytest.mark.parametrize("measure", ["cka", "rsa"])
def test_null_tells_related_from_smooth(measure):
    rng = np.random.default_rng(1)
    shared = prepare(ar_noise(rng, (150, 6), 0.8), 2.0)
    x, y = shared @ rng.normal(size=(6, 12)), shared @ rng.normal(size=(6, 9)) + rng.normal(size=(150, 9))
    found = compare_similarity(x, y, measure=measure, n_permutations=60)
    assert found.p == pytest.approx(1 / 61)
    p = []
    for _ in range(20):
        a, b = (prepare(ar_noise(rng, (150, 8), 0.9), 2.0) for _ in range(2))
        p.append(compare_similarity(a, b, measure=measure, n_permutations=39).p)
    assert np.mean(np.array(p) <= 0.05) <= 0.2
    assert 0.25 < np.mean(p) < 0.75


def test_bad_similarity():
    x = np.random.default_rng(0).normal(size=(50, 3))
    with pytest.raises(InputError, match="at least 3 columns"):
        rsa(x[:, :2], x)
    with pytest.raises(InputError, match="measure='cca'"):
        compare_similarity(x, x, measure="cca")
    with pytest.raises(InputError, match="exclude=50"):
        debiased_cka(x, x, exclude=50)
    with pytest.raises(InputError, match="40 volumes"):
        debiased_cka(x, x[:40])
