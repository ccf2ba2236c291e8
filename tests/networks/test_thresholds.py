"""Cut-offs against independent implementations and known mixtures."""

import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn.exceptions import ConvergenceWarning

from llmbrain import FunctionalNetworks, InputError, NeuronSpace
from llmbrain.networks import NullNetworks, compare_thresholds, null_networks
from llmbrain.networks.thresholds import fit_mixture

RNG = np.random.default_rng


def mixed(seed=0, n=20000, positive=0.05, negative=0.02):
    """z values of which some are active; and which are."""
    rng = RNG(seed)
    truth = rng.choice([0, 1, -1], size=n, p=[1 - positive - negative, positive, negative])
    tail = rng.gamma(9, 0.6, size=n)
    return np.where(truth == 0, rng.normal(0, 1, size=n), truth * tail), truth


def test_auto_keeps_what_canica_keeps():
    maps = RNG(0).laplace(size=(5, 400))
    networks = FunctionalNetworks(maps).rethreshold("auto")
    z = networks.maps
    expected = np.abs(z) >= stats.scoreatpercentile(np.abs(z), 100 - 100 / 5)  # nilearn's rule, from its source
    np.testing.assert_array_equal(networks.masks, expected)
    assert networks.masks.sum() == 400
    half = networks.rethreshold("auto", ratio=0.5)
    assert half.masks.sum() == 200


def test_mixture_finds_the_parameters_and_the_active():
    z, truth = mixed()
    fit = fit_mixture(z)
    np.testing.assert_allclose(fit.weights, [0.93, 0.05, 0.02], atol=0.01)
    assert fit.sd == pytest.approx(1, abs=0.03)
    assert fit.shapes[0] * fit.scales[0] == pytest.approx(5.4, rel=0.06)
    true = np.stack(
        [
            0.93 * stats.norm.pdf(z),
            0.05 * stats.gamma.pdf(z, 9, scale=0.6),
            0.02 * stats.gamma.pdf(-z, 9, scale=0.6),
        ]
    )
    assert fit.log_likelihood == pytest.approx(np.log(true.sum(axis=0)).sum(), rel=2e-3)
    low, high = fit.cutoffs(z)
    bayes = true[1] > true[0]
    assert (high < z)[bayes | (z > 0)].mean() == pytest.approx(bayes[bayes | (z > 0)].mean(), abs=0.01)
    assert low < -high  # the rarer pole needs more
    assert ((z > high) == (truth == 1)).mean() > 0.98


def test_mixture_of_noise_is_nearly_empty_and_scale_free():
    noise = RNG(1).normal(size=(3, 5000))
    networks = FunctionalNetworks(noise).rethreshold("mixture")
    assert (networks.sizes < 0.01 * 5000).all()
    z, _ = mixed(2)
    a, b = fit_mixture(z), fit_mixture(z * 50)
    np.testing.assert_allclose(np.array(b.cutoffs(z * 50)) / 50, a.cutoffs(z), rtol=1e-3)
    flipped = fit_mixture(-z).cutoffs(-z)
    np.testing.assert_allclose([-flipped[1], -flipped[0]], a.cutoffs(z), rtol=1e-3)
    assert fit_mixture(np.zeros(10)).cutoffs(np.zeros(10)) == (-np.inf, np.inf)


def test_fdr_and_fwe_by_hand():
    rng = RNG(0)
    null = NullNetworks.from_maps([rng.normal(size=(4, 2000)) for _ in range(39)])
    z, truth = mixed(3, n=4000)
    networks = FunctionalNetworks(np.stack([z, rng.normal(size=4000)]), standardize=False)
    exact = 2 * stats.norm.sf(np.abs(z))
    np.testing.assert_allclose(null.p_values(z)[exact > 1e-3], exact[exact > 1e-3], rtol=0.1, atol=2e-4)
    fdr, fwe = (networks.rethreshold(method, null=null) for method in ("fdr", "fwe"))
    expected = stats.false_discovery_control(null.p_values(z)) <= 0.05
    np.testing.assert_array_equal(fdr.masks[0], expected)
    false = (truth[fdr.masks[0]] == 0).mean()
    assert false < 0.08
    assert fdr.sizes[1] <= 2
    assert fwe.cutoffs[0, 1] == pytest.approx(np.sort(null.maxima)[-2])  # 2 of 39 draws: (1 + 1) / 40
    assert fwe.sizes[1] <= 1
    assert fwe.sizes[0] < fdr.sizes[0]
    with pytest.raises(InputError, match="at least 99 null draws"):
        networks.rethreshold("fwe", alpha=0.01, null=null)


def test_real_sources_pass_the_null_of_their_own_scans():
    from llmbrain.datasets import make_phantom
    from llmbrain.decomposition import GroupICA

    phantom = make_phantom(4, n_neurons=800, n_runs=2, n_tokens=150, cnr=2.0, random_state=0)
    networks = FunctionalNetworks.from_ica(GroupICA(4, random_state=0).fit(phantom.scans))
    null = null_networks(phantom.scans, 4, n_permutations=20, progress=False)
    fwe = networks.rethreshold("fwe", null=null)
    assert (fwe.sizes > 5).all()
    active = phantom.maps != 0
    own = np.array([active[np.argmax([(a & m).sum() for a in active])] for m in fwe.masks])
    assert (fwe.masks & ~own).sum() / fwe.masks.sum() < 0.1
    table = compare_thresholds(networks, null)
    assert table.method.unique().tolist() == ["fixed", "auto", "mixture", "fdr", "fwe"]
    assert (table[table.method == "fixed"].dice == 1).all()
    assert len(table) == 20


def test_poles_survive_and_save(tmp_path):
    maps = np.stack([mixed(s, n=2000)[0] for s in range(2)])
    split = FunctionalNetworks(maps, poles="split")
    mixture = split.rethreshold("mixture")
    assert mixture.poles == ["positive", "negative"] * 2
    assert (mixture.maps[mixture.masks][: mixture.sizes[0]] > 0).all()
    assert not (mixture.masks[1] & (mixture.maps[1] > 0)).any()
    mixture.save(tmp_path)
    back = FunctionalNetworks.load(tmp_path)
    np.testing.assert_array_equal(back.rethreshold("fixed").masks, split.masks)
    assert back.provenance["threshold_method"] == "mixture"


def test_maps_of_part_of_the_model_are_scored_within_it():
    from types import SimpleNamespace

    window = RNG(0).laplace(size=50)
    full = np.concatenate([np.zeros(150), window])
    networks = FunctionalNetworks.from_ica(SimpleNamespace(components_=full[None], space_=NeuronSpace([150, 50])), 2)
    np.testing.assert_allclose(networks.maps[0, 150:], stats.zscore(window), atol=1e-6)
    assert not networks.masks[0, :150].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "loud"}, "method='loud'"),
        ({"method": "fdr"}, "needs null="),
        ({"method": "auto", "ratio": 0}, "ratio=0"),
        ({"method": "mixture", "probability": 1}, "probability=1"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        FunctionalNetworks(RNG(0).normal(size=(2, 50))).rethreshold(**options)


@pytest.mark.parametrize("seed", range(5))
def test_mixture_on_peaked_maps_stays_sensible(seed):
    """Maps of ICA are peaked: a bulk that shrank into the peak made everything a network."""
    sizes = FunctionalNetworks(RNG(seed).laplace(size=(2, 4000))).rethreshold("mixture").sizes
    assert (sizes < 0.2 * 4000).all()
    assert (sizes > 0.02 * 4000).all()


@pytest.mark.parametrize("sides", [[-1, 1], [1]])
@pytest.mark.parametrize("share", [0.03, 0.1, 0.2, 0.3])
def test_mixture_finds_the_share_of_a_phantom(share, sides):
    rng, n = RNG(3), 6000
    active = int(share * n)
    z = np.r_[rng.normal(size=n - active), (3 + rng.gamma(3, 1, size=active)) * rng.choice(sides, active)]
    networks = FunctionalNetworks(z[None]).rethreshold("mixture")
    truth = np.arange(n) >= n - active
    assert (networks.masks[0] == truth).mean() > 0.985
    assert networks.sizes[0] == pytest.approx(active, rel=0.05)


def test_mixture_without_a_bulk_is_refused(monkeypatch):
    from dataclasses import replace

    from llmbrain.networks import thresholds

    lost = replace(fit_mixture(RNG(0).normal(size=500)), weights=np.array([0.4, 0.3, 0.3]))
    monkeypatch.setattr(thresholds, "fit_mixture", lambda z: lost)
    networks = FunctionalNetworks(RNG(0).normal(size=(1, 500)))
    with pytest.raises(InputError, match="bulk of map 0 holds 40%"):
        networks.rethreshold("mixture")
    with pytest.warns(UserWarning, match="left out"):
        assert "mixture" not in set(compare_thresholds(networks).method)


def test_mixture_that_did_not_converge_says_so(monkeypatch):
    from llmbrain.networks import thresholds

    monkeypatch.setattr(thresholds, "fit_mixture", lambda z: fit_mixture(z, max_iter=2))
    with pytest.warns(UserWarning, match="map 0 did not converge in 2 steps"):
        FunctionalNetworks(RNG(1).normal(size=(1, 500))).rethreshold("mixture")


def test_a_null_of_normal_time_courses_is_warned_of_where_they_are_heavy_tailed():
    rng = np.random.default_rng(0)
    heavy = rng.standard_t(3, size=(60, 80)) ** 3
    with pytest.warns(UserWarning, match="time courses are heavy-tailed"):
        null_networks([heavy], 2, n_permutations=1, progress=False, max_iter=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        null_networks([rng.laplace(size=(60, 80))], 2, n_permutations=1, progress=False, max_iter=2)


def test_a_null_of_few_independent_tokens_is_warned_of():
    from llmbrain.datasets.fmri_phantom import ar_noise

    rng = np.random.default_rng(3)
    for ar, said in ((0.9, True), (0.0, False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            null_networks([ar_noise(rng, (60, 80), ar)], 2, n_permutations=1, progress=False, max_iter=2)
        assert any("independent ones" in str(w.message) for w in caught) == said
