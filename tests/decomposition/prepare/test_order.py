"""How many components."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from ica_data import K, T, V
from sklearn.exceptions import ConvergenceWarning

from llmbrain import InputError
from llmbrain.datasets.fmri_phantom import ar_noise
from llmbrain.decomposition import GroupICA
from llmbrain.decomposition.prepare.order import mdl_order, parallel_order


@pytest.mark.parametrize("criterion", ["auto", "parallel"])
def test_number_of_components_is_estimated(data, criterion):
    _, runs = data
    ica = GroupICA(criterion).fit(runs)
    assert ica.n_components_ == K
    estimates = ica.order_estimates_["model"]
    assert estimates["mdl_per_run"] == estimates["parallel_per_run"] == [K] * 3


@pytest.mark.parametrize("shape", [(700, 400), (420, 400), (300, 2000)])
def test_number_of_components_of_any_shape_and_of_none(shape):
    """More tokens than neurons, nearly square, more neurons than tokens; and noise alone."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=shape)
    signal = 3 * rng.normal(size=(shape[0], 5)) @ np.where(rng.random((5, shape[1])) < 0.2, 1.0, 0.0)
    for run, expected in [(noise + signal, 5), (noise, 1)]:
        centred = run - run.mean(axis=0)
        centred = torch.from_numpy(centred - centred.mean(axis=1, keepdims=True))
        assert mdl_order(centred)[0] == expected
        assert parallel_order(centred, np.random.RandomState(0)) == expected


def test_number_of_components_when_neighbours_resemble_each_other(data):
    """Smooth noise is what the subsampling is for: each neuron's noise is half its neighbour's."""
    maps, _ = data
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(T, V + 3))
    noise = (noise[:, :-3] + noise[:, 1:-2] + noise[:, 2:-1] + noise[:, 3:]) / 2
    run = 2 * rng.normal(size=(T, K)) @ maps + noise
    estimates = GroupICA("auto", standardize="center").fit([run]).order_estimates_["model"]
    assert estimates["subsampling_per_run"][0] > 1
    assert abs(estimates["mdl"] - K) <= 1


@pytest.mark.parametrize("ar", [0.6, 0.9])
def test_noise_with_a_memory_is_not_taken_for_components(ar):
    """Without whitening the description length finds 15 to 20 components for 5 at .9."""
    rng = np.random.default_rng(1)
    maps = rng.laplace(size=(5, 400)) * (rng.random((5, 400)) < 0.2)
    run = ar_noise(rng, (150, 5), ar) @ maps + ar_noise(rng, (150, 400), ar)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        for criterion in ("auto", "parallel"):
            assert 4 <= GroupICA(criterion, max_iter=1).fit([run]).n_components_ <= 5
    centred = torch.from_numpy((run - run.mean(axis=0)) / run.std(axis=0))
    if ar == 0.9:
        assert mdl_order(centred - centred.mean(dim=1, keepdim=True))[0] > 10


def test_other_colors_are_warned_of():
    rng = np.random.default_rng(2)
    noise, weights = rng.normal(size=(158, 400)), np.hanning(9)
    run = sum(w * noise[i : i + 150] for i, w in enumerate(weights))
    with (
        pytest.warns(UserWarning, match=r"n_components='auto': tokens correlate with those near them by up to 0\.\d+"),
        pytest.raises(InputError, match="is more than the rank of the data"),
    ):
        GroupICA("auto", max_iter=1).fit([run])
