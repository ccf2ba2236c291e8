"""`NeuronMasker`."""

from __future__ import annotations

import numpy as np
import pytest

import llmbrain as lb
from llmbrain._validation import InputError
from llmbrain.imaging import NeuronMasker, maps_to_nifti, read_nifti

SPACE = lb.NeuronSpace([30, 17, 24])


def values(n: int | None = 5, space: lb.NeuronSpace = SPACE, seed: int = 0) -> np.ndarray:
    shape = (space.n_neurons,) if n is None else (n, space.n_neurons)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_neuron_masker() -> None:
    from sklearn.base import clone

    data = values(6)
    image = maps_to_nifti(data, SPACE)
    for masker in (NeuronMasker().fit(image), NeuronMasker(SPACE), clone(NeuronMasker(SPACE)).fit()):
        assert (masker.transform(image) == data).all()
        assert (read_nifti(masker.inverse_transform(data[:2]))[0] == data[:2]).all()
    assert NeuronMasker().fit([image]).mask_img_.get_fdata().sum() == SPACE.n_neurons
    assert [x.shape for x in NeuronMasker(SPACE).transform([image, image])] == [(6, 71)] * 2
    with pytest.raises(InputError, match="imgs=None"):
        NeuronMasker().fit()
