"""Sparsity and matching: closed forms."""

import numpy as np
import pytest
from scipy import stats

from llmbrain import InputError
from llmbrain.stats import PUBLISHED_Z
from llmbrain.stats.matching import best_pairs, correlate_rows, match_maps
from llmbrain.stats.sparsity import gini, hoyer, overlap_matrix, zscore_maps


def test_gini_and_hoyer_have_their_closed_forms():
    single, equal = np.zeros(50), np.ones(50)
    single[3] = -2
    assert gini(equal) == pytest.approx(0)
    assert gini(single) == pytest.approx(1 - 1 / 50)
    assert hoyer(equal) == pytest.approx(0, abs=1e-12)
    assert hoyer(single) == pytest.approx(1)
    x = np.random.default_rng(0).gamma(2, size=80)
    assert gini(x) == pytest.approx(np.abs(x[:, None] - x).mean() / (2 * x.mean()))
    assert hoyer(x) == pytest.approx((np.sqrt(80) - np.linalg.norm(x, 1) / np.linalg.norm(x)) / (np.sqrt(80) - 1))
    assert np.isnan([gini(np.zeros(4)), hoyer(np.zeros(4))]).all()


def test_z_of_maps_is_scipys():
    maps = np.random.default_rng(0).normal(3, 2, size=(2, 30))
    np.testing.assert_allclose(zscore_maps(maps), stats.zscore(maps, axis=1), rtol=1e-5)
    assert not zscore_maps(np.full((1, 5), 0.1)).any()
    assert PUBLISHED_Z == 3.6


def test_overlaps_by_hand():
    a = np.array([[1, 1, 0, 0]], dtype=bool)
    b = np.array([[0, 1, 1, 1], [0, 0, 0, 0]], dtype=bool)
    np.testing.assert_allclose(overlap_matrix(a, b), [[2 / 5, 0]])
    np.testing.assert_allclose(overlap_matrix(a, b, "iou"), [[1 / 4, 0]])


def test_matching_is_the_best_of_all_orders():
    from itertools import permutations

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 40)), rng.normal(size=(5, 40))
    r = correlate_rows(a, b)
    np.testing.assert_allclose(r, np.corrcoef(a, b)[:5, 5:])
    rows, columns = best_pairs(r)
    best = max(sum(abs(r[i, j]) for i, j in enumerate(order)) for order in permutations(range(5)))
    assert np.abs(r[rows, columns]).sum() == pytest.approx(best)
    index, matched = match_maps(-b[[2, 0]], b)
    assert index.tolist() == [1, -1, 0, -1, -1]
    np.testing.assert_allclose(matched[[0, 2]], -1)
    with pytest.raises(InputError, match="40 and 39 neurons"):
        correlate_rows(a, b[:, :39])
