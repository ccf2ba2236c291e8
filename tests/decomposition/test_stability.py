"""Stability: Iq by hand, ICASSO on phantoms that are easy, hard and empty, halves against surrogates."""

import warnings

import numpy as np
import pytest

from llmbrain import InputError
from llmbrain.datasets.phantom import PHANTOM_CELLS, make_phantom
from llmbrain.decomposition.reproducibility import split_half_reproducibility
from llmbrain.decomposition.stability import (
    UnstableComponentsWarning,
    cluster_quality,
    ica_stability,
    model_order_sweep,
    r_index,
)


@pytest.fixture(scope="module")
def easy():
    return make_phantom(n_sources=5, n_neurons=1500, n_layers=4, n_runs=8, n_tokens=150, random_state=1)


@pytest.fixture(scope="module")
def by_hand():
    similarity = np.eye(5)
    pairs = {12: 0.9, 13: 0.8, 23: 0.7, 45: 0.6, 14: 0.1, 15: 0.2, 24: 0.3, 25: 0.1, 34: 0.2, 35: 0.1}
    for pair, value in pairs.items():
        i, j = pair // 10 - 1, pair % 10 - 1
        similarity[i, j] = similarity[j, i] = value
    return similarity


def test_iq_by_hand(by_hand):
    iq, strict = cluster_quality(by_hand, [1, 1, 1, 2, 2])
    np.testing.assert_allclose(iq, [0.8 - 1 / 6, 0.6 - 1 / 6])
    np.testing.assert_allclose(iq, [0.6333, 0.4333], atol=5e-5)
    np.testing.assert_allclose(strict, [0.4, 0.3])
    single, _ = cluster_quality(by_hand, [1, 1, 1, 1, 2])
    assert np.isnan(single[1])
    assert np.isfinite(single[0])


def test_r_index_by_hand(by_hand):
    inside = [1 - 0.8, 1 - 0.6]
    between = 1 - 1 / 6
    assert r_index(by_hand, [0, 0, 0, 1, 1]) == pytest.approx(np.mean([d / between for d in inside]))
    assert np.isnan(r_index(by_hand, [0, 1, 2, 3, 4]))


@pytest.mark.parametrize("resample", ["both", "starts", "bootstrap"])
def test_true_sources_are_stable(easy, resample):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnstableComponentsWarning)
        result = ica_stability(easy.scans, 5, n_starts=8, resample=resample, device="cpu")
    assert result.iq.min() > 0.8  # one start in some ten ends between two sources
    assert np.median(result.iq) > 0.9
    assert (np.diff(result.iq) <= 0).all()
    np.testing.assert_array_equal(result.recovered, 1)
    np.testing.assert_array_equal(result.sizes, 8)
    np.testing.assert_array_equal(np.bincount(result.labels), 8)
    assert result.r_index < 0.2
    assert easy.score(result.maps)["map_r_min"] > 0.95
    np.testing.assert_allclose(result.maps.std(axis=1), 1, rtol=1e-4)
    assert result.space == easy.space
    assert result.to_frame().shape == (5, 4)


def test_similarity_is_the_correlation_of_maps(easy):
    result = ica_stability(easy.scans, 5, n_starts=3, device="cpu")
    r = np.abs(np.corrcoef(result.maps))
    centres = [
        own[result.similarity[np.ix_(own, own)].sum(axis=1).argmax()]
        for own in (np.flatnonzero(result.labels == k) for k in range(5))
    ]
    np.testing.assert_allclose(result.similarity[np.ix_(centres, centres)], r, atol=1e-4)


def test_stable_maps_are_those_of_group_ica(easy):
    from llmbrain import GroupICA
    from llmbrain.stats.matching import match_maps

    ica = GroupICA(5, device="cpu").fit(easy.scans)
    stable = ica_stability(easy.scans, 5, n_starts=8, resample="starts", device="cpu")
    assert np.abs(match_maps(stable.maps, ica.components_)[1]).min() > 0.999


def test_repeatable(easy):
    first, again, other = (
        ica_stability(easy.scans, 5, n_starts=3, random_state=s, device="cpu").similarity for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_noise_is_unstable_and_says_so():
    rng = np.random.default_rng(0)
    noise = [rng.standard_normal((60, 500)).astype(np.float32) for _ in range(4)]
    with pytest.warns(UnstableComponentsWarning, match=r"components are unstable, Iq below 0.8: .*\("):
        result = ica_stability(noise, 6, n_starts=6, device="cpu")
    assert np.nanmedian(result.iq) < 0.6


def test_surplus_components_are_the_unstable_ones(easy):
    with pytest.warns(UnstableComponentsWarning):
        result = ica_stability(easy.scans, 9, n_starts=10, device="cpu")
    assert (result.iq[:5] > 0.9).all()
    assert np.nanmin(result.iq[5:]) < 0.8
    assert easy.score(result.maps[:5])["map_r_min"] > 0.95


def test_sweep_is_a_table(easy):
    table = model_order_sweep(easy.scans, (3, 5, 8), n_starts=6, device="cpu")
    assert table["n_components"].tolist() == [3, 5, 8]
    assert table["share_stable"].tolist()[1] == 1
    assert table["share_stable"][2] < 1
    assert table["n_stable"][1] == 5


def test_halves_agree_on_sources_and_not_on_noise(easy):
    result = split_half_reproducibility(easy.scans, 5, n_splits=2, n_permutations=9, max_iter=50, device="cpu")
    assert result.reproducibility.min() > 0.9
    assert result.null.max() < 0.5
    np.testing.assert_allclose(result.p, 1 / 10)
    assert result.r.shape == (2, 5)
    rng = np.random.default_rng(0)
    noise = [rng.standard_normal((60, 400)).astype(np.float32) for _ in range(4)]
    empty = split_half_reproducibility(noise, 5, n_splits=2, n_permutations=19, max_iter=50, device="cpu")
    assert empty.p.min() > 0.05


def test_stable_is_not_true():
    """With little data, repeats agree on maps that are not those of any source; split halves tell."""
    cell = PHANTOM_CELLS["hardest"]
    phantom = make_phantom(**cell.settings, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnstableComponentsWarning)
        result = ica_stability(phantom.scans, 8, n_starts=10, resample="starts", device="cpu")
    score = phantom.score(result.maps)
    stable = result.iq[score["match"]] > 0.9
    assert (stable & (score["map_r"] < 0.6)).any()
    halves = split_half_reproducibility(phantom.scans, 8, n_splits=3, n_permutations=0, device="cpu")
    assert np.isnan(halves.p).all()
    assert np.median(halves.reproducibility) < 0.5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n_starts": 1}, "n_starts=1"),
        ({"resample": "all"}, "resample='all'"),
        ({"smoothing": 4}, "smoothing=4 is not an option"),
        ({"axis": "time"}, "axis='time'"),
        ({"method": "dictlearning"}, "method='dictlearning'"),
        ({"cca": True}, "cca=True"),
        ({"n_components": 2000}, "n_components=2000"),
        ({"threshold": 2}, "threshold=2"),
    ],
)
def test_bad_input_is_named(easy, options, named):
    with pytest.raises(InputError, match=named):
        ica_stability(easy.scans, **{"n_components": 5, "device": "cpu", **options})


def test_bad_input_of_the_others(easy):
    with pytest.raises(InputError, match="at least 2 runs"):
        split_half_reproducibility(easy.scans[:1], 5)
    with pytest.raises(InputError, match="orders is empty"):
        model_order_sweep(easy.scans, ())
    with pytest.raises(InputError, match="similarity has shape"):
        cluster_quality(np.eye(3), [0, 1])
