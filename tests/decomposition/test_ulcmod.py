"""ULCMOD finds planted modules and topics, and its search only ever raises what it is to raise."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.metrics import adjusted_rand_score

from llmbrain import FunctionalNetworks, InputError
from llmbrain.decomposition import ULCMOD, read_ica
from llmbrain.decomposition.ulcmod import _Blocks, balanced_kmeans


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """60 samples of 10 tokens; neurons of three modules are more active in the samples of their topic."""
    rng = np.random.default_rng(seed)
    topics, modules = np.repeat(rng.permutation(np.arange(60) % 3), 10), np.arange(90) % 3
    run = rng.normal(size=(600, 90)) * (1 + 2 * (topics[:, None] == modules[None])) * rng.uniform(0.1, 10, 90)
    return run, topics[::10], modules


def test_planted_modules_and_topics_are_found():
    run, topics, modules = planted()
    run[:, 0] = 0  # never active
    found = ULCMOD(3, samples=10, drop_positions=0).fit(run)
    assert found.labels_[0] == -1
    assert adjusted_rand_score(modules[1:], found.labels_[1:]) == 1
    assert adjusted_rand_score(topics, found.topics_) == 1
    assert found.converged_
    assert found.components_.shape == (3, 90)
    for k in range(3):  # maps live in their module, where the topic drives it
        assert (found.components_[k][found.labels_ == k] > 0).all()
        assert not found.components_[k][found.labels_ != k].any()
    again = clone(found).fit(run)
    np.testing.assert_array_equal(again.labels_, found.labels_)


def test_the_objective_is_the_published_one():
    run, _, _ = planted(1)
    found = ULCMOD(3, samples=10, drop_positions=0, max_iter=1).fit(run)
    rows = np.abs(run).reshape(60, 10, 90).mean(axis=1)
    z = (rows - rows.mean(axis=0)) / rows.std(axis=0, ddof=1)
    blocks = [z[np.ix_(found.topics_ == k, found.labels_ == k)] for k in range(3)]
    sizes = np.array([b.size for b in blocks])
    assert found.activation_ == pytest.approx(sum(b.sum() for b in blocks) / sizes.sum())
    assert found.balance_ == pytest.approx(3 / (1 / sizes).sum())


def test_every_move_raises_it():
    rng = np.random.default_rng(2)
    state = _Blocks(rng.normal(size=(24, 40)), np.arange(24) % 4, rng.integers(0, 4, 40), 4)
    before = np.prod(state.factors())
    for _ in range(4):
        state.move_neurons(np.random.RandomState(0))
        middle = np.prod(state.factors())
        state.move_samples(np.random.RandomState(0))
        after = np.prod(state.factors())
        assert before <= middle <= after
        own = state.topics[:, None] == state.modules[None]
        assert state.total == pytest.approx(state.scores[own].sum())
        before = after


def test_balanced_groups():
    points = np.random.default_rng(3).normal(size=(23, 2)) + np.repeat([[0, 0], [9, 9]], [20, 3], axis=0)
    counts = np.bincount(balanced_kmeans(points, 4, 3, np.random.RandomState(0)))
    assert sorted(counts) == [5, 6, 6, 6]


class Run:
    """A run with events."""

    def __init__(self, data: np.ndarray, lengths: list[int]) -> None:
        self._data, onsets = data, np.cumsum([0, *lengths[:-1]])
        self.events = pd.DataFrame({"onset": onsets, "duration": lengths, "trial_type": "any"})

    def data(self) -> np.ndarray:
        return self._data


def test_events_are_samples():
    run, topics, _ = planted(4)
    found = ULCMOD(3, drop_positions=0).fit([Run(run[:300], [10] * 30), Run(run[300:], [10] * 30)])
    assert adjusted_rand_score(topics, found.topics_) == 1
    assert found.samples_[30].tolist() == [1, 0, 10]


def test_a_fit_is_saved_and_read(tmp_path):
    run, _, _modules = planted(5)
    run[:, 0] = 0
    found = ULCMOD(3, samples=10, drop_positions=0).fit([run[:300], run[300:]])
    found.save(tmp_path)
    again = read_ica(tmp_path)
    assert isinstance(again, ULCMOD)
    assert again.get_params() == found.get_params()
    for name in ("components_", "labels_", "topics_", "samples_"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    assert (again.objective_, again.converged_) == (found.objective_, found.converged_)
    assert again.get_feature_names_out().tolist() == ["ulcmod0", "ulcmod1", "ulcmod2"]
    with pytest.raises(FileExistsError):
        found.save(tmp_path)
    for a, b in zip(again.transform([run[:300], run[300:]]), found.mixing_):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match="X has 89 features, but ULCMOD is expecting 90 features"):
        again.transform(run[:, 1:])


def test_a_time_course_is_the_mean_scaled_activity_of_a_module():
    run, _topics, _ = planted(6)
    found = ULCMOD(3, samples=10, drop_positions=0).fit(run)
    rows = np.abs(run).reshape(60, 10, 90).mean(axis=1)
    z = (np.abs(run) - rows.mean(axis=0)) / rows.std(axis=0, ddof=1)
    for k in range(3):
        np.testing.assert_allclose(found.mixing_[0][:, k], z[:, found.labels_ == k].mean(axis=1), rtol=1e-4, atol=1e-5)
    means = [found.mixing_[0][np.repeat(found.topics_ == k, 10), k].mean() for k in range(3)]
    assert min(means) > max(found.mixing_[0][np.repeat(found.topics_ != k, 10), k].mean() for k in range(3))


def test_networks_are_the_modules():
    run, _, _ = planted(7)
    run[:, 0] = 0
    found = ULCMOD(3, samples=10, drop_positions=0).fit(run)
    networks = FunctionalNetworks.from_ica(found)
    for k in range(3):
        np.testing.assert_array_equal(networks.masks[k], found.labels_ == k)
    np.testing.assert_array_equal(networks.maps, found.components_)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"n_components": 61, "samples": 10}, "samples of text"),
        ({"n_components": 2}, "samples of text"),
        ({"n_components": 0}, "n_components"),
        ({"samples": 0}, "samples"),
    ],
)
def test_what_cannot_be_is_refused(options, names):
    with pytest.raises(InputError, match=names):
        ULCMOD(**options).fit(planted()[0])
    with pytest.raises(InputError, match="not constant"):
        ULCMOD(3, samples=10).fit(np.ones((100, 5)))


@pytest.mark.parametrize("name", ["n_components", "samples", "n_init", "max_iter", "pca"])
def test_counts_are_whole(name):
    with pytest.raises(InputError, match=f"{name}=2.5 must be a whole number"):
        ULCMOD(**{"n_components": 2, name: 2.5}).fit(np.random.default_rng(0).normal(size=(30, 20)))
