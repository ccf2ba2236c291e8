"""Coupling: known answers on Alice, error rates and power on paired phantoms."""

import warnings

import numpy as np
import pytest
from scipy import stats

from llmbrain import InputError
from llmbrain.brains import align, load_fmri, load_words, prepare, word_regressor
from llmbrain.comparison import couple, noise_ceilings
from llmbrain.comparison.coupling import group_mean, sign_flip_test
from llmbrain.datasets.fmri_phantom import ar_noise, make_paired_phantom

REGIONS = ["LATL", "RATL", "LPTL", "LIPL", "LPreM", "LIFG"]


@pytest.fixture(scope="module")
def alice(shared_data):
    """Brains after the high-pass, and the timed words."""
    folder = shared_data / "fmri/alice"
    with pytest.warns(UserWarning, match="s33"):
        fmri = load_fmri(folder / "alice_data_shared/10mm", regions=REGIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what it says is tested in test_align.py
        words = load_words(folder / "ds002322_annotations.tsv")
    return prepare(fmri.data, 2.0), words.dropna(subset=["onset"]).reset_index(drop=True)


def rate(words):
    return prepare(word_regressor(words, 2.0, 362, offset=20.0), 2.0)


def test_word_rate_couples_with_all_six_regions(alice):
    brain, words = alice
    result = couple(rate(words), brain, regions=REGIONS)
    np.testing.assert_allclose(result.r[0], [0.319, 0.315, 0.411, 0.461, 0.449, 0.362], atol=0.005)
    assert result.n_permutations == 343
    assert result.threshold == pytest.approx(0.229, abs=0.005)
    assert result.significant.all()
    np.testing.assert_allclose(result.p_corrected, 1 / 344)
    frame = result.to_frame()
    assert frame["region"][0] == "LIPL"
    assert (frame["r_over_ceiling"] < 1).all()


def test_mirrored_words_couple_with_none_though_parametric_p_says_so(alice):
    brain, words = alice
    mirrored = words.assign(onset=763.4 - words["offset"], offset=763.4 - words["offset"]).sort_values("onset")
    series = rate(mirrored)
    result = couple(series, brain, regions=REGIONS)
    assert not result.significant.any()
    assert np.abs(result.r).max() == pytest.approx(0.18, abs=0.01)
    parametric = [stats.pearsonr(series[:, 0], region).pvalue for region in group_mean(brain).T]
    assert np.sum(np.array(parametric) < 0.05) == 4


def test_ceilings_of_alice(alice):
    ceilings = noise_ceilings(alice[0], regions=REGIONS)
    np.testing.assert_allclose(ceilings["isc"], [0.253, 0.202, 0.381, 0.233, 0.216, 0.180], atol=0.002)
    np.testing.assert_allclose(ceilings["reliability"], [0.716, 0.638, 0.845, 0.688, 0.663, 0.598], atol=0.01)
    np.testing.assert_allclose(ceilings["ceiling"], np.sqrt(ceilings["reliability"]))
    assert (ceilings["isc_upper"] > ceilings["isc"]).all()


# -- error rates -------------------------------------------------------------------------------------------------------


def uncoupled(kind, seed):
    """Series of two brains that share nothing but their smoothness (AR .9), 8 by 6."""
    rng = np.random.default_rng(seed)
    if kind == "series":
        return ar_noise(rng, (362, 8), 0.9), ar_noise(rng, (362, 6), 0.9)
    phantom = make_paired_phantom(n_volumes=250, n_neurons=10, random_state=seed)  # words, HRF and high-pass in between
    series = align(phantom.scan, phantom.words, 2.0, 250, series=phantom.time_courses, high_pass=128.0)
    return series.data, prepare(phantom.fmri.data[0], 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["series", "paired phantom"])
@pytest.mark.parametrize("null", ["circular", "phase"])
def test_family_wise_error_is_held_where_the_parametric_test_fails(null, kind):
    """200 draws; expected .05 +- .015 (one standard error)."""
    false, parametric, draws = 0, 0, 200
    for seed in range(draws):
        x, y = uncoupled(kind, seed)
        result = couple(x, y, null=null, n_permutations=99, lags=[0], random_state=seed)
        false += bool(result.significant.any())
        largest, n = np.abs(result.r).max(), len(x)
        p = 2 * stats.t.sf(largest * np.sqrt((n - 2) / (1 - largest**2)), n - 2)
        parametric += p * 48 < 0.05  # Bonferroni
    assert 0.02 <= false / draws <= 0.08
    assert parametric / draws > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("n_nuisance", "ar", "share"), [(14, 0.9, 0.0), (4, 0.5, 2.0)])
def test_family_wise_error_is_held_beyond_a_nuisance(n_nuisance, ar, share):
    """Nuisance that is smoother or rougher than what it hides; 150 draws, expected at most .05 +- .018."""
    false, draws = 0, 150
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        nuisance = ar_noise(rng, (362, n_nuisance), ar)
        x, y = (ar_noise(rng, (362, k), 0.9) + share * nuisance @ rng.normal(size=(n_nuisance, k)) / n_nuisance**0.5
                for k in (10, 6))  # fmt: skip
        x, y, nuisance = (prepare(series, 2.0) for series in (x, y, nuisance))
        false += couple(x, y, nuisance=nuisance, n_permutations=59, lags=[0], random_state=seed).significant.any()
    assert false / draws <= 0.11


def test_false_discovery_correction_is_silent_on_noise():
    rng = np.random.default_rng(1)
    hits = [
        couple(ar_noise(rng, (150, 4), 0.9), ar_noise(rng, (150, 4), 0.9), correction="fdr", lags=[0]).significant.any()
        for _ in range(60)
    ]
    assert np.mean(hits) <= 0.15  # .05 expected, 60 draws


def test_phantom_without_coupling_and_with():
    silent = make_paired_phantom(n_subjects=4, random_state=4)
    planted = make_paired_phantom(n_subjects=4, n_pairs=4, snr=1.0, random_state=4)
    found = []
    for phantom in (silent, planted):
        series = align(phantom.scan, phantom.words, phantom.tr, 360, series=phantom.time_courses)
        result = couple(prepare(series, 2.0), prepare(phantom.fmri.data, 2.0))
        found.append({(int(k), int(r)) for k, r in np.argwhere(result.significant)})
        if phantom is planted:
            assert all(np.sign(result.r[k, r]) == sign for k, r, sign in phantom.pairs)
            matched = {(m.network, m.region) for m in result.matches.itertuples() if m.p_corrected <= 0.05}
            assert matched == {(f"network{k}", f"region{r}") for k, r, _ in phantom.pairs}
            assert result.match_p < 0.01
            assert (result.ceilings["ceiling"][:4] > result.ceilings["ceiling"][4:].fillna(0).max()).all()
            # the shared part is all that subjects share, so the model reaches the ceiling
            np.testing.assert_allclose(np.abs(result.r[range(4), range(4)]), result.ceilings["ceiling"][:4], atol=0.12)
    assert found[0] == set()
    assert found[1] == {(k, r) for k, r, _ in planted.pairs}


def test_power_at_a_modest_ceiling():
    hits = []
    for seed in range(10):
        phantom = make_paired_phantom(n_subjects=10, n_pairs=2, snr=0.35, random_state=seed)
        series = align(phantom.scan, phantom.words, 2.0, 360, series=phantom.time_courses)
        result = couple(prepare(series, 2.0), prepare(phantom.fmri.data, 2.0), lags=[0])
        hits += [result.significant[k, r] for k, r, _ in phantom.pairs]
    assert np.mean(hits) >= 0.8


def test_a_brain_that_is_late_is_seen_in_the_lag_profile():
    phantom = make_paired_phantom(n_pairs=3, snr=3.0, timing_error=4.0, ar=0.5, random_state=0)
    series = align(phantom.scan, phantom.words, 2.0, 360, series=phantom.time_courses)
    result = couple(prepare(series, 2.0), prepare(phantom.fmri.data, 2.0))
    best = result.lags[np.abs(result.lag_r).argmax(axis=0)]
    assert [best[k, r] for k, r, _ in phantom.pairs] == [2, 2, 2]


def test_own_networks_as_brain_are_matched_back_to_themselves():
    phantom = make_paired_phantom(n_networks=6, random_state=5)
    series = prepare(align(phantom.scan, phantom.words, 2.0, 360, series=phantom.time_courses), 2.0)
    rng = np.random.default_rng(0)
    order, signs = rng.permutation(6), rng.choice([-1, 1], 6)
    brain = series[:, order] * signs + ar_noise(rng, series.shape, 0.5)
    result = couple(series, brain)
    region_of = dict(zip(result.matches["network"], result.matches["region"]))
    assert region_of == {f"network{k}": f"region{i}" for i, k in enumerate(order)}
    by_region = result.matches.set_index("region")["r"]
    assert [np.sign(by_region[f"region{i}"]) for i in range(6)] == signs.tolist()


# -- pieces ------------------------------------------------------------------------------------------------------------


def test_partial_correlation_is_the_textbook_one():
    rng = np.random.default_rng(0)
    common = rng.normal(size=(300, 2))
    x, y = rng.normal(size=(300, 2)) + common, rng.normal(size=(300, 3)) + common @ rng.normal(size=(2, 3))
    result = couple(x, y, nuisance=common)
    inverse = [
        [np.linalg.inv(np.cov(np.column_stack([x[:, [i]], y[:, [j]], common]).T)) for j in range(3)] for i in range(2)
    ]
    expected = [[-m[0, 1] / np.sqrt(m[0, 0] * m[1, 1]) for m in row] for row in inverse]
    np.testing.assert_allclose(result.r, expected, atol=1e-10)
    np.testing.assert_allclose(result.r_raw, np.corrcoef(x.T, y.T)[:2, 2:], atol=1e-12)


def test_nuisance_that_explains_everything_leaves_no_coupling():
    rng = np.random.default_rng(0)
    shared = ar_noise(rng, (300, 1), 0.8)
    x, y = shared + 0.5 * rng.normal(size=(300, 1)), shared + 0.5 * rng.normal(size=(300, 1))
    assert couple(x, y).significant.all()
    assert not couple(x, y, nuisance=shared).significant.any()


def test_sign_flips_find_what_subjects_share_and_hold_their_level():
    rng = np.random.default_rng(0)
    found, p = sign_flip_test(np.tanh(rng.normal(0.3, 0.2, size=(20, 2, 2))))
    np.testing.assert_allclose(found, 0.29, atol=0.1)
    assert (p <= 0.01).all()
    level = [
        (sign_flip_test(np.tanh(rng.normal(0, 0.2, (12, 4))), n_permutations=199)[1] <= 0.05).any() for _ in range(200)
    ]
    assert 0.02 <= np.mean(level) <= 0.09


def test_dead_series_are_nan_and_said():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 3)), rng.normal(size=(4, 100, 2))
    x[:, 1] = 2.0
    y[0, :, 1] = np.nan
    with pytest.warns(UserWarning, match=r"llm_series: 1 of \d+ are constant or NaN \(network1\)"):
        result = couple(x, y)
    assert np.isnan(result.r[1]).all()
    assert np.isnan(result.p_corrected[1]).all()
    assert np.isfinite(result.r[[0, 2]]).all()
    assert np.isnan(result.subject_r[0, 0, 1])
    assert result.ceilings["n_subjects"].tolist() == [4, 3]


def test_bad_coupling():
    x = np.random.default_rng(0).normal(size=(100, 2))
    for arguments, message in (
        ({"brain_series": x[:90]}, "90 volumes, the other series 100"),
        ({"brain_series": x, "null": "parametric"}, "null='parametric'"),
        ({"brain_series": x, "min_shift": 45}, "19 are needed"),
        (
            {"brain_series": x, "nuisance": np.random.default_rng(1).normal(size=(100, 99))},
            "99 regressors for 100 volumes",
        ),
        ({"brain_series": x, "networks": ["a"]}, "1 names for 2"),
        ({"brain_series": np.zeros((100, 2))}, "every series is constant"),
        ({"brain_series": np.where(np.arange(100)[:, None] == 3, np.nan, x)}, "not finite"),
    ):
        with pytest.raises(InputError, match=message):
            couple(x, **arguments)
