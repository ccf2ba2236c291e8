"""scikit-learn's own checks of the estimators, with every expected failure beside its reason."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from llmbrain import GroupICA, InputError, NeuronMasker, NeuronSpace, dual_regression, maps_to_nifti

LIST = "transform gives a list, one array of time courses a run, even for a single run"
PLANE = "two neurons, each token centred over neurons, leave one dimension: two components are refused, by the rank"
ALONE = "a run is standardized over its own tokens: a part of it is another run, and one token is none"
IMAGE = "the check passes an array: a masker takes images"
EXPECTED = {
    "GroupICA": {
        "check_transformer_general": LIST,
        "check_transformer_data_not_an_array": LIST,
        "check_transformer_preserve_dtypes": LIST,
        "check_methods_sample_order_invariance": LIST,
        "check_methods_subset_invariance": ALONE,
        "check_estimators_overwrite_params": PLANE,
        "check_estimators_fit_returns_self": PLANE,
        "check_readonly_memmap_input": PLANE,
        "check_fit_idempotent": PLANE,
        "check_fit_check_is_fitted": PLANE,
        "check_n_features_in": PLANE,
    },
    "NeuronMasker": dict.fromkeys(
        [
            "check_complex_data", "check_dict_unchanged", "check_dont_overwrite_parameters", "check_dtype_object",
            "check_estimators_dtypes", "check_estimators_empty_data_messages", "check_estimators_fit_returns_self",
            "check_estimators_nan_inf", "check_estimators_overwrite_params", "check_estimators_pickle",
            "check_f_contiguous_array_estimator", "check_fit2d_1feature", "check_fit2d_1sample",
            "check_fit2d_predict1d", "check_fit_check_is_fitted", "check_fit_idempotent", "check_fit_score_takes_y",
            "check_methods_sample_order_invariance", "check_methods_subset_invariance", "check_n_features_in",
            "check_n_features_in_after_fitting", "check_pipeline_consistency", "check_positive_only_tag_during_fit",
            "check_readonly_memmap_input", "check_transformer_data_not_an_array", "check_transformer_general",
            "check_transformer_preserve_dtypes",
        ],
        IMAGE,
    ),
}  # fmt: skip


@parametrize_with_checks(
    [GroupICA(2), NeuronMasker()], expected_failed_checks=lambda estimator: EXPECTED[type(estimator).__name__]
)
def test_scikit_learn(estimator, check):
    check(estimator)


def test_usual_errors():
    rng = np.random.default_rng(0)
    run = rng.normal(size=(40, 12))
    with pytest.raises(InputError, match="runs=None"):
        GroupICA(2).fit(None)
    with pytest.raises(InputError, match=r"single neuron \(n_features=1\)"):
        GroupICA(1).fit(run[:, :1])
    with pytest.raises(InputError, match="Reshape your data"):
        GroupICA(2).fit(run[:, 0])
    with pytest.raises(NotFittedError):
        GroupICA(2).transform(run)
    ica = GroupICA(2).fit([run, run + rng.normal(size=run.shape)])
    assert ica.n_features_in_ == 12
    assert ica.get_feature_names_out().tolist() == ["groupica0", "groupica1"]
    with pytest.raises(InputError, match="X has 11 features, but GroupICA is expecting 12 features"):
        ica.transform(run[:, 1:])


def test_masker_keeps_the_contract_on_images():
    space = NeuronSpace([3, 2])
    image = maps_to_nifti(np.ones((2, 5), dtype=np.float32), space)
    masker = NeuronMasker().fit(image)
    assert masker.n_features_in_ == 5
    assert masker.get_feature_names_out().tolist()[2:4] == ["layer0_neuron2", "layer1_neuron0"]
    assert not hasattr(clone(masker), "space_")
    with pytest.raises(NotFittedError):
        NeuronMasker().transform(image)
    assert NeuronMasker(space).transform(image).shape == (2, 5)


def test_standardize_means_the_same_everywhere():
    rng = np.random.default_rng(1)
    maps = rng.laplace(size=(2, 60))
    run = rng.normal(size=(50, 2)) @ maps * np.exp(rng.normal(size=60)) + rng.normal(size=(50, 60))
    found = {value: dual_regression(maps, [run], standardize=value).maps for value in (True, "zscore", False, "none")}
    np.testing.assert_array_equal(found[True], found["zscore"])
    np.testing.assert_array_equal(found[False], found["none"])
    assert np.abs(found[True] - found[False]).max() > 0.1
    for value in (True, "zscore"):
        ica = GroupICA(2, standardize=value).fit(run)
        assert ica.standardize is value  # the constructor only stores
    with pytest.raises(InputError, match="standardize='unit'"):
        dual_regression(maps, [run], standardize="unit")
