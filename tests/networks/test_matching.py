"""Networks find themselves again, and nothing else does."""

import itertools

import numpy as np
import pytest

from llmbrain import FunctionalNetworks, InputError, NeuronSpace
from llmbrain.networks.matching import (
    match_networks,
    recurrence,
    shuffle_within_layers,
    single_run_networks,
    split_half,
    template_matches,
)

SPACE = NeuronSpace([100, 200, 100])


def sparse(n, seed, space=SPACE):
    rng = np.random.default_rng(seed)
    maps = rng.normal(0, 0.3, size=(n, space.n_neurons))
    for row in maps:
        row[rng.choice(space.n_neurons, 20, replace=False)] += rng.choice([-4, 4], 20)
    return maps


def test_signs_and_order_are_found():
    maps = sparse(5, 0)
    order, signs = [3, 0, 4, 1, 2], np.array([1, -1, 1, -1, -1])
    a = FunctionalNetworks(maps, SPACE)
    b = FunctionalNetworks(maps[order] * signs[:, None] + 0.2 * sparse(5, 1), SPACE)
    frame = match_networks(a, b, n_permutations=50)
    assert {i: order[j] for i, j in zip(frame.network_a, frame.network_b)} == {i: i for i in range(5)}
    np.testing.assert_array_equal(np.sign(frame.r), signs[frame.network_b])
    assert (frame.p == 1 / 51).all()
    assert np.abs(frame.r).is_monotonic_decreasing
    expected = [np.corrcoef(a.maps[i], b.maps[j])[0, 1] for i, j in zip(frame.network_a, frame.network_b)]
    np.testing.assert_allclose(frame.r, expected, atol=1e-6)


def test_assignment_is_the_best_of_all():
    a, b = (FunctionalNetworks(np.random.default_rng(s).normal(size=(4, 400)), SPACE) for s in (0, 1))
    r = np.abs(np.corrcoef(a.maps, b.maps)[:4, 4:])
    best = max(sum(r[i, p[i]] for i in range(4)) for p in itertools.permutations(range(4)))
    frame = match_networks(a, b, n_permutations=99)
    assert np.abs(frame.r).sum() == pytest.approx(best)
    assert frame.p.min() > 0.05


def test_unequal_numbers():
    frame = match_networks(FunctionalNetworks(sparse(3, 0)), FunctionalNetworks(sparse(5, 0)[:4]))
    assert len(frame) == 3


def test_template_matches_by_hand():
    maps = np.zeros((4, 20))
    maps[0, :4] = maps[1, 2:6] = maps[2, 10:12] = 9
    networks = FunctionalNetworks(maps, threshold=5, standardize=False)
    frame = template_matches(networks.subset([0, 2, 3]), networks.subset([1, 3]))
    assert frame.overlap.tolist() == pytest.approx([2 / 6, 0, 0])
    assert frame.network.tolist() == [0, -1, -1]
    assert frame.found.tolist() == [True, False, False]


def test_recurrence_against_its_null():
    maps = sparse(3, 0)
    templates = FunctionalNetworks(maps, SPACE, threshold=2.5)
    rng = np.random.default_rng(5)
    runs = []
    for run in range(8):
        found = maps.copy() + rng.normal(0, 0.3, size=maps.shape)
        found[2] = sparse(1, 100 + run)[0]  # the third is another one each time
        if run % 2:
            found[1] = sparse(1, 200 + run)[0]  # the second is there every other time
        runs.append(FunctionalNetworks(found[rng.permutation(3)], SPACE, threshold=2.5))
    frame = recurrence(templates, runs, n_permutations=99)
    assert frame.rate.tolist() == [1, 0.5, 0]
    assert frame.p_overlap[:2].tolist() == [0.01, 0.01]
    assert frame.p[2] == 1
    assert frame.p_overlap[2] > 0.05
    assert (frame.chance_rate < 0.01).all()


def test_shuffle_keeps_layers():
    order = shuffle_within_layers(FunctionalNetworks(sparse(1, 0), SPACE), np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(order), np.arange(400))
    np.testing.assert_array_equal(SPACE.layer_of[order], SPACE.layer_of)
    assert (order != np.arange(400)).mean() > 0.9


def test_halves_and_single_runs_of_a_phantom():
    from llmbrain.datasets import make_phantom

    phantom = make_phantom(4, n_neurons=600, n_runs=4, n_tokens=200, cnr=2.0, presence=1.0, random_state=0)
    for by in ("runs", "tokens"):
        frame = split_half(phantom.scans, 4, by=by, n_permutations=30)
        assert np.abs(frame.r).min() > 0.8
        assert (frame.p < 0.05).all()
    runs = single_run_networks(phantom.scans, 4, threshold=2.0)
    truth = FunctionalNetworks(phantom.standardized(), phantom.space, threshold=2.0)
    assert (recurrence(truth, runs, n_permutations=30).rate == 1).all()


def test_bad_input():
    a, b = FunctionalNetworks(sparse(2, 0), SPACE), FunctionalNetworks(sparse(2, 0), NeuronSpace([400]))
    with pytest.raises(InputError, match="lie in NeuronSpace"):
        match_networks(a, b)
    with pytest.raises(InputError, match="cover 400 and 10 neurons"):
        match_networks(a, FunctionalNetworks(np.eye(2, 10)))
    with pytest.raises(InputError, match="runs is empty"):
        recurrence(a, [])
    with pytest.raises(InputError, match="two runs at least"):
        split_half([np.zeros((10, 5), dtype=np.float32)], 2)
