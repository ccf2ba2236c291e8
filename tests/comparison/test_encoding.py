"""Encoding models: folds that respect time, bands, and nulls; known answers on Alice."""

import warnings

import numpy as np
import pytest
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import KFold, cross_val_predict

from llmbrain import InputError
from llmbrain.brains import load_fmri, load_words, prepare
from llmbrain.comparison.coupling import group_mean
from llmbrain.comparison.encoding import contiguous_folds, encode
from llmbrain.datasets.fmri_phantom import ar_noise

pytest.importorskip("himalaya", reason="encoding models need llmbrain[encoding]")


@pytest.fixture(scope="module")
def alice(shared_data):
    """Mean brain, words per volume, and the same for mirrored words."""
    folder = shared_data / "fmri/alice"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what they say is tested in test_align.py and test_fmri.py
        brain = load_fmri(folder / "alice_data_shared/10mm")
        words = load_words(folder / "ds002322_annotations.tsv").dropna(subset=["offset"])
    times = words["offset"].to_numpy()
    edges = 20.0 + 2.0 * np.arange(363)
    counts = [np.histogram(t, edges)[0].astype(float)[:, None] for t in (times, 763.4 - times)]
    return group_mean(prepare(brain.data, 2.0)), *counts


def test_folds_are_blocks_with_gaps():
    folds = contiguous_folds(362, 5, 8)
    assert np.concatenate([test for _, test in folds]).tolist() == list(range(362))
    for train, test in folds:
        assert (np.diff(test) == 1).all()
        assert np.abs(train[:, None] - test).min() == 9
    with pytest.raises(InputError, match="n_folds=5, gap=200"):
        contiguous_folds(362, 5, 200)


def test_time_alone_predicts_only_when_folds_are_shuffled(alice):
    brain = alice[0]
    time = np.arange(362)
    bumps = np.exp(-((time[:, None] - time[::2]) ** 2) / (2 * 2.0**2))
    shuffled = cross_val_predict(
        RidgeCV(np.logspace(-3, 3, 7)), bumps, brain, cv=KFold(5, shuffle=True, random_state=0)
    )
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(shuffled.T, brain.T)]
    assert np.mean(r) == pytest.approx(0.84, abs=0.05)
    contiguous = encode(bumps, brain, tr=2.0, delays=[0], n_permutations=19)
    assert abs(contiguous.r.mean()) < 0.1


def test_words_predict_and_mirrored_words_do_not(alice):
    brain, counts, mirrored = alice
    real = encode(counts, brain, tr=2.0, delays=[1, 2, 3, 4], n_permutations=99)
    assert real.r.mean() > 0.25
    assert (real.p_corrected <= 0.05).all()
    fake = encode(mirrored, brain, tr=2.0, delays=[1, 2, 3, 4], n_permutations=99)
    assert fake.r.mean() < 0.1
    assert (fake.p_corrected > 0.05).all()


def test_prediction_is_sklearns_ridge():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5))
    y = x @ rng.normal(size=(5, 3)) + rng.normal(size=(200, 3))
    result = encode(x, y, tr=2.0, delays=[0], gap=4, alphas=[0.3], n_permutations=19)
    for (train, test), fold_r in zip(contiguous_folds(200, 5, 4), result.fold_r):
        z = (x - x[train].mean(axis=0)) / x[train].std(axis=0) / np.sqrt(5)
        t = (y - y[train].mean(axis=0)) / y[train].std(axis=0)
        expected = Ridge(alpha=0.3, fit_intercept=False).fit(z[train], t[train]).predict(z[test])
        np.testing.assert_allclose(result.prediction[test], expected * y[train].std(axis=0), atol=1e-8)
        np.testing.assert_allclose(fold_r, [np.corrcoef(a, b)[0, 1] for a, b in zip(expected.T, y[test].T)])


def test_bands_take_apart_what_each_explains():
    rng = np.random.default_rng(0)
    controls, networks = ar_noise(rng, (300, 2), 0.7), ar_noise(rng, (300, 40), 0.7)
    noise = ar_noise(rng, (300, 3), 0.7)
    y = noise + np.column_stack([controls[:, 0], 2 * networks[:, 0], np.zeros(300)])
    bands = {"controls": controls, "networks": networks}
    settings = {"delays": [0], "n_iter": 8, "n_permutations": 39, "ceiling": [0.8, 0.9, np.nan]}
    result = encode(bands, y, tr=2.0, tested=["controls", "networks"], **settings)
    frame = result.to_frame().set_index("target")
    assert frame["gain_controls_p_corrected"].le(0.05).tolist() == [True, False, False]
    assert frame["gain_networks_p_corrected"].le(0.05).tolist() == [False, True, False]
    assert frame.loc["target0", "r_over_ceiling"] == pytest.approx(result.r[0] / 0.8)
    assert frame.loc["target2", "p_corrected"] > 0.05


@pytest.mark.slow
def test_encoding_holds_its_level():
    """8 draws of smooth series that share nothing: more than 2 hits have a chance of .006 at a level of .05."""
    hits = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x, y = (prepare(ar_noise(rng, (250, k), 0.8), 2.0) for k in (6, 6))
        result = encode(x, y, tr=2.0, delays=[1, 2], n_permutations=19, random_state=seed)
        hits += bool((result.p_corrected <= 0.05).any())
    assert hits <= 2


def test_dead_targets_and_bad_input():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(120, 2)), rng.normal(size=(120, 3))
    y[:, 1] = np.nan
    result = encode(x, y, tr=2.0, n_permutations=19)
    assert np.isnan(result.r).tolist() == [False, True, False]
    assert np.isnan(result.p_corrected).tolist() == [False, True, False]
    for arguments, message in (
        ({"features": x[:100], "targets": y}, "100 volumes, the other series 120"),
        ({"features": np.zeros((120, 1)), "targets": y}, "every column is constant"),
        ({"features": x, "targets": y, "tr": 2000}, "milliseconds"),
        ({"features": x, "targets": y, "null": "shuffle"}, "null='shuffle'"),
        ({"features": x, "targets": y, "min_shift": 55}, "19 are needed"),
        ({"features": x, "targets": y, "tested": ["b"]}, "tested='b'"),
        ({"features": {}, "targets": y}, "no band"),
    ):
        with pytest.raises(InputError, match=message):
            encode(**{"tr": 2.0, **arguments})
