"""``random_state=None`` draws anew and works wherever something is drawn."""

import numpy as np
import pytest

from llmbrain import GroupICA, InputError
from llmbrain._validation import seed_of
from llmbrain.comparison import compare, compare_similarity, compare_structure, couple, noise_ceilings
from llmbrain.datasets.fmri_phantom import make_paired_phantom
from llmbrain.networks import graph_measures


def test_none_is_a_seed_of_its_own():
    assert seed_of(None) != seed_of(None)
    assert seed_of(np.int64(7)) == 7
    for bad in (-1, 1.5, "3", True):
        with pytest.raises(InputError, match="random_state="):
            seed_of(bad)


def test_seeds_of_every_kind_start_the_decomposition():
    run = np.random.default_rng(0).laplace(size=(60, 2)) @ np.random.default_rng(1).laplace(size=(2, 30))
    runs = [run + 0.1 * np.random.default_rng(i).normal(size=run.shape) for i in (2, 3)]

    def maps(seed):
        return GroupICA(2, random_state=seed).fit(runs).components_

    np.testing.assert_array_equal(maps(np.random.RandomState(3)), maps(3))
    np.testing.assert_array_equal(maps(np.random.default_rng(3)), maps(np.random.default_rng(3)))
    assert maps(None).shape == (2, 30)
    with pytest.raises(InputError, match="random_state='three'"):
        maps("three")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_everything_in_comparison_takes_none():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 12)), rng.normal(size=(3, 80, 12))
    a, b = (couple(x, y, null="phase", n_permutations=30, random_state=None) for _ in range(2))
    assert not np.allclose(a.null_max, b.null_max)
    assert np.isfinite(noise_ceilings(y, n_splits=5, random_state=None)["isc"]).all()
    assert 0 < compare_similarity(x, y[0], n_permutations=19, random_state=None).p <= 1
    few = {"densities": [0.2], "n_permutations": 3, "n_seeds": 2, "random_state": None}
    assert len(compare_structure(x, y[0], **few))
    assert len(graph_measures(np.corrcoef(x.T), **few))
    phantom = make_paired_phantom(n_networks=3, n_regions=4, n_volumes=120, n_neurons=20, random_state=None)
    result = compare(phantom.scan, phantom.fmri, phantom.words, tr=2.0, series=phantom.time_courses, encoding=False,
                     n_permutations=19, random_state=None)  # fmt: skip
    assert result.report["settings"]["random_state"] >= 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_setting_that_is_not_known_is_named():
    phantom = make_paired_phantom(n_networks=3, n_regions=4, n_volumes=120, n_neurons=20)
    with pytest.raises(InputError, match="hfr= is no setting of compare: allowed are text"):
        compare(phantom.scan, phantom.fmri, phantom.words, tr=2.0, hfr="spm")
