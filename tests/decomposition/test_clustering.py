"""Rivals of an ICA find planted groups of neurons."""

from __future__ import annotations

import numpy as np
import pytest

from llmbrain import GroupICA


@pytest.mark.parametrize("method", ["kmeans", "nmf"])
def test_planted_groups_are_found(method):
    rng = np.random.default_rng(0)
    runs, groups = [], np.arange(240) % 6  # five groups, and neurons of none
    for _ in range(3):
        courses = rng.normal(size=(200, 6))
        courses[:, 5] = 0
        runs.append(courses[:, groups] * (0.5 + rng.random(240)) + 0.4 * rng.normal(size=(200, 240)))
    ica = GroupICA(5, method=method, random_state=0).fit(runs)
    assert ica.components_.shape == (5, 240)
    for k in range(5):
        hit = [np.isin(np.argsort(-m)[:40], np.flatnonzero(groups == k)).mean() for m in ica.components_]
        assert max(hit) > 0.95
    again = GroupICA(5, method=method, random_state=0).fit(runs)
    np.testing.assert_array_equal(again.components_, ica.components_)
