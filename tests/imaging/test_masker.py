"""`NeuronMasker`."""

from __future__ import annotations

import pytest
from image_data import SPACE, values

from llmbrain._validation import InputError
from llmbrain.imaging import NeuronMasker, maps_to_nifti, read_nifti


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
